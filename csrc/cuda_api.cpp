#include "cuda_api.h"

#include <chrono>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

#ifdef ROLL_CKPT_CUDA
#include <cuda_runtime_api.h>

#include <exception>
#include <functional>
#include <memory>

#include "gather.h"
#include "thread_pool.h"
#endif

namespace roll::cuda {
namespace {

#ifdef ROLL_CKPT_CUDA

constexpr uint64_t kSmall = 64 << 10;  // below this a copy engine call costs more than the bytes
constexpr size_t kFew = 8;             // fewer separate copies than this cost no more than a kernel

void check(cudaError_t code, const char* call) {
    if (code == cudaSuccess) return;
    cudaGetLastError();
    throw std::runtime_error(std::string(call) + " failed: " + cudaGetErrorString(code) + " (error " +
                             std::to_string(static_cast<int>(code)) + ")");
}

// A stream, and the event by which its thread waits for it. The event is created with the stream, so that
// waiting cannot fail for lack of one.
struct Stream {
    cudaStream_t queue = nullptr;
    cudaEvent_t end = nullptr;
    bool gathers = false;
    ~Stream() {
        if (end) cudaEventDestroy(end);
        if (queue) cudaStreamDestroy(queue);
    }
};

Stream& stream_of(void* stream) { return *static_cast<Stream*>(stream); }

std::string status() {
    int count = 0;
    cudaError_t code = cudaGetDeviceCount(&count);
    if (code == cudaSuccess && count > 0) return "";
    cudaGetLastError();
    if (code == cudaSuccess) return "the CUDA driver reports no device";
    return std::string("no usable CUDA device: ") + cudaGetErrorString(code) + " (error " +
           std::to_string(static_cast<int>(code)) + ")";
}

// Permits CUDA calls of this thread while another captures a graph; restores the old mode.
class RelaxedCapture {
  public:
    RelaxedCapture() {
        check(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode");
    }
    ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

  private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

void use(int device) {
    check(cudaSetDevice(device), "cudaSetDevice");
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
}

// Runs `work` where `device` is the current one: on this thread, or else on a temporary one. Switching this
// thread's device back and forth would create a context (hundreds of megabytes) on the thread's current
// device, which in a new thread is 0 whatever the process uses.
void on_device(int device, const std::function<void()>& work) {
    int current = -1;
    check(cudaGetDevice(&current), "cudaGetDevice");
    if (current == device) {
        RelaxedCapture relaxed;
        work();
        return;
    }
    std::exception_ptr error;
    SignalsBlocked blocked;
    std::thread([&] {
        try {
            use(device);
            work();
        } catch (...) {
            error = std::current_exception();
        }
    }).join();
    if (error) std::rethrow_exception(error);
}

void* open_stream() {
    int least = 0, greatest = 0;
    check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
    auto stream = std::make_unique<Stream>();
    check(cudaStreamCreateWithPriority(&stream->queue, cudaStreamNonBlocking, least),
          "cudaStreamCreateWithPriority");
    check(cudaEventCreateWithFlags(&stream->end, cudaEventDisableTiming | cudaEventBlockingSync),
          "cudaEventCreateWithFlags");
    auto code = static_cast<cudaError_t>(load_gather());
    stream->gathers = code == cudaSuccess;
    if (code == cudaErrorNoKernelImageForDevice) {
        cudaGetLastError();
    } else {
        check(code, "loading the gather kernel");
    }
    return stream.release();
}

void close_stream(void* stream) { delete &stream_of(stream); }

void* record(int device, int64_t stream) {
    auto callers = reinterpret_cast<cudaStream_t>(stream);
    cudaEvent_t event = nullptr;
    on_device(device, [&] {
        cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
        check(cudaStreamIsCapturing(callers, &capturing), "cudaStreamIsCapturing");
        if (capturing != cudaStreamCaptureStatusNone) {
            throw std::runtime_error(
                "cannot save while a CUDA graph is being captured on the current stream");
        }
        check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
        cudaError_t code = cudaEventRecord(event, callers);
        if (code != cudaSuccess) cudaEventDestroy(event);
        check(code, "cudaEventRecord");
    });
    return event;
}

void drop(int device, void* event) {
    try {
        on_device(device, [event] { cudaEventDestroy(static_cast<cudaEvent_t>(event)); });
    } catch (const std::exception&) {
        // The context was destroyed, and the event with it.
    }
}

void follow(void* stream, void* event) {
    check(cudaStreamWaitEvent(stream_of(stream).queue, static_cast<cudaEvent_t>(event), 0),
          "cudaStreamWaitEvent");
}

void copy(void* stream, const Region* regions, size_t count, bool mapped) {
    const Stream& own = stream_of(stream);
    const bool gathers = mapped && own.gathers && count >= kFew;
    ptrdiff_t seen_from_device = 0;  // device address minus host address of the same pinned byte
    if (gathers) {
        void* seen = nullptr;
        check(cudaHostGetDevicePointer(&seen, regions[0].target, 0), "cudaHostGetDevicePointer");
        seen_from_device = static_cast<unsigned char*>(seen) - static_cast<unsigned char*>(regions[0].target);
    }
    GatherTable small;
    int waiting = 0;
    auto gather = [&] {
        if (waiting > 0) {
            check(static_cast<cudaError_t>(launch_gather(small, waiting, own.queue)), "the gather kernel");
        }
        waiting = 0;
    };
    for (size_t i = 0; i < count; ++i) {
        const Region& region = regions[i];
        if (gathers && region.nbytes < kSmall) {
            small.source[waiting] = static_cast<const unsigned char*>(region.source);
            small.target[waiting] = static_cast<unsigned char*>(region.target) + seen_from_device;
            small.nbytes[waiting] = region.nbytes;
            if (++waiting == kGatherRegions) gather();
        } else {
            check(cudaMemcpyAsync(region.target, region.source, region.nbytes, cudaMemcpyDeviceToHost,
                                  own.queue),
                  "cudaMemcpyAsync");
        }
    }
    gather();
}

void finish(void* stream) {
    const Stream& own = stream_of(stream);
    check(cudaEventRecord(own.end, own.queue), "cudaEventRecord");
    check(cudaEventSynchronize(own.end), "copying from the device");
}

void pin(void* data, uint64_t nbytes) {
    check(cudaHostRegister(data, nbytes, cudaHostRegisterPortable | cudaHostRegisterMapped),
          "cudaHostRegister");
}

void unpin(int device, void* data) {
    try {
        on_device(device, [data] { cudaHostUnregister(data); });
    } catch (const std::exception&) {
        // The context was destroyed, and the registration with it.
    }
}

constexpr Table kTable{true, status, use,  open_stream, close_stream, record,
                       drop, follow, copy, finish,      pin,          unpin};

#else

[[noreturn]] void missing() {
    throw std::runtime_error("roll_ckpt was built without CUDA: build it again where nvcc is on the PATH");
}

constexpr Table kTable{
    false,
    [] { return std::string("built without CUDA"); },
    [](int) { missing(); },
    []() -> void* { missing(); },
    [](void*) {},
    [](int, int64_t) -> void* { missing(); },
    [](int, void*) {},
    [](void*, void*) { missing(); },
    [](void*, const Region*, size_t, bool) { missing(); },
    [](void*) { missing(); },
    [](void*, uint64_t) { missing(); },
    [](int, void*) {},
};

#endif

const Table* in_use = &kTable;

double twin_copy_s = 0;

using TwinStream = std::vector<Region>;  // copies that are queued

constexpr Table kTwin{
    true,
    [] { return std::string(); },
    [](int) {},
    []() -> void* { return new TwinStream; },
    [](void* stream) { delete static_cast<TwinStream*>(stream); },
    [](int, int64_t) -> void* { return nullptr; },
    [](int, void*) {},
    [](void*, void*) {},
    [](void* stream, const Region* regions, size_t count, bool) {
        static_cast<TwinStream*>(stream)->insert(static_cast<TwinStream*>(stream)->end(), regions,
                                                 regions + count);
    },
    [](void* stream) {
        std::this_thread::sleep_for(std::chrono::duration<double>(twin_copy_s));
        for (const Region& region : *static_cast<TwinStream*>(stream))
            std::memcpy(region.target, region.source, region.nbytes);
        static_cast<TwinStream*>(stream)->clear();
    },
    [](void*, uint64_t) {},
    [](int, void*) {},
};

}  // namespace

const Table& table() { return *in_use; }

void use_twin(double copy_s) {
    twin_copy_s = copy_s;
    in_use = &kTwin;
}

}  // namespace roll::cuda
