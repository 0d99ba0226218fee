// All of CUDA behind one table of functions. A build without CUDA has a twin table that says so.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace roll::cuda {

// Bytes of a device that go to pinned (or, slower, plain) host memory.
struct Region {
    const void* source;
    void* target;
    uint64_t nbytes;
};

// Every function but status(), drop() and unpin() throws std::runtime_error with the call and CUDA's text.
// Streams and events are opaque and belong to who opened them. No function changes the current device of a
// thread that is not ours, or makes a context on a device that the process does not use.
struct Table {
    bool compiled;
    std::string (*status)();  // "" if a device can be used, else the reason; makes no context, never throws

    // Native threads only: selects the device and lets them work while another thread captures a graph.
    void (*use)(int device);
    void* (*open_stream)();  // non-blocking, lowest priority, on the selected device
    void (*close_stream)(void* stream);

    // Any thread: an event behind all that `stream` of `device` was given so far. Refuses a stream that is
    // being captured.
    void* (*record)(int device, int64_t stream);
    void (*drop)(int device, void* event);

    void (*follow)(void* stream, void* event);  // later work of `stream` waits for the event
    // Queues copies. With `mapped` (all targets lie in memory of one pin()) many small regions go in few
    // kernels.
    void (*copy)(void* stream, const Region* regions, size_t count, bool mapped);
    void (*finish)(void* stream);  // returns when all its work is done, without spinning

    void (*pin)(void* data, uint64_t nbytes);  // on the selected device, for all devices
    void (*unpin)(int device, void* data);     // any thread; `device` is the one it was pinned on
};

const Table& table();

}  // namespace roll::cuda
