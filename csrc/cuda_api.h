// All of CUDA behind one table of functions. A build without CUDA has a table of the same shape whose
// functions say so. The twin needs no device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace roll::cuda {

// Bytes of a device that are copied to pinned (or, slower, pageable) host memory.
struct Region {
    const void* source;
    void* target;
    uint64_t nbytes;
};

// Every function but status(), drop() and unpin() throws std::runtime_error with the failed call and CUDA's
// text. Streams and events are opaque and belong to the caller that opened them. No function changes the
// current device of a thread that is not one of ours, or creates a context on a device that the process does
// not use.
struct Table {
    bool compiled;
    std::string (*status)();  // "" if a device can be used, else the reason; creates no context, never throws

    // Native threads only: selects the device and permits CUDA calls while another thread captures a graph.
    void (*use)(int device);
    void* (*open_stream)();  // non-blocking, lowest priority, on the selected device
    void (*close_stream)(void* stream);

    // Any thread: an event behind all work queued so far on `stream` of `device`. Throws if the stream is
    // being captured into a graph.
    void* (*record)(int device, int64_t stream);
    void (*drop)(int device, void* event);

    void (*follow)(void* stream, void* event);  // later work of `stream` waits for the event
    // Queues copies. With `mapped` (all targets lie in memory of one pin()) small regions are gathered by few
    // kernels.
    void (*copy)(void* stream, const Region* regions, size_t count, bool mapped);
    void (*finish)(void* stream);  // waits for all its work, without spinning

    void (*pin)(void* data, uint64_t nbytes);  // on the selected device, for all devices
    void (*unpin)(int device, void* data);     // any thread; `device` is the one it was pinned on
};

const Table& table();

// For tests where there is no device: makes table() a twin for which the memory of every device is that of
// the host. A copy is made when finish() waits for it, which takes `copy_s` seconds. Call it before anything
// else.
void use_twin(double copy_s);

}  // namespace roll::cuda
