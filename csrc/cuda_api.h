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

// Every function but status() throws std::runtime_error with the call and CUDA's text. Streams and events are
// opaque and belong to who opened them.
struct Table {
    bool compiled;
    std::string (*status)();  // "" if a device can be used, else the reason; makes no context, never throws

    // Native threads: selects the device and lets them work while another thread captures a graph.
    void (*use)(int device);
    void* (*open_stream)();  // non-blocking, lowest priority, on the selected device
    void (*close_stream)(void* stream);

    // Caller's thread: an event behind all that `stream` of `device` was given so far. Leaves the caller's
    // current device as it was; refuses a stream that is being captured.
    void* (*record)(int device, int64_t stream);
    void (*drop)(int device, void* event);

    void (*follow)(void* stream, void* event);  // later work of `stream` waits for the event
    // Queues copies. With `mapped` (all targets lie in pinned memory) many small regions go in few kernels.
    void (*copy)(void* stream, const Region* regions, size_t count, bool mapped);
    void (*finish)(void* stream);  // returns when all its work is done, without spinning

    void (*pin)(void* data, uint64_t nbytes);
    void (*unpin)(void* data);  // never throws
};

const Table& table();

}  // namespace roll::cuda
