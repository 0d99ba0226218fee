#include "cuda_api.h"

#include <stdexcept>

#ifdef ROLL_CKPT_CUDA
#include <cuda_runtime_api.h>

#include "gather.h"
#endif

namespace roll::cuda {
namespace {

#ifdef ROLL_CKPT_CUDA

constexpr uint64_t kSmall = 64 << 10;  // below this a copy engine call costs more than the bytes

void check(cudaError_t code, const char* call) {
    if (code == cudaSuccess) return;
    cudaGetLastError();
    throw std::runtime_error(std::string(call) + " failed: " + cudaGetErrorString(code) + " (error " +
                             std::to_string(static_cast<int>(code)) + ")");
}

// Lets this thread make CUDA calls while some thread captures a graph; puts the old mode back.
class RelaxedCapture {
  public:
    RelaxedCapture() {
        check(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode");
    }
    ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

  private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// The caller's current device, restored at the end of the scope.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&old_), "cudaGetDevice");
        if (device != old_) check(cudaSetDevice(device), "cudaSetDevice");
        changed_ = device != old_;
    }
    ~OnDevice() {
        if (changed_) cudaSetDevice(old_);
    }

  private:
    int old_ = 0;
    bool changed_ = false;
};

std::string status() {
    int count = 0;
    cudaError_t code = cudaGetDeviceCount(&count);
    if (code == cudaSuccess && count > 0) return "";
    cudaGetLastError();
    if (code == cudaSuccess) return "the CUDA driver reports no device";
    return std::string("no usable CUDA device: ") + cudaGetErrorString(code) + " (error " +
           std::to_string(static_cast<int>(code)) + ")";
}

void use(int device) {
    check(cudaSetDevice(device), "cudaSetDevice");
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
}

void* open_stream() {
    int least = 0, greatest = 0;
    check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, least),
          "cudaStreamCreateWithPriority");
    return stream;
}

void close_stream(void* stream) { cudaStreamDestroy(static_cast<cudaStream_t>(stream)); }

void* record(int device, int64_t stream) {
    OnDevice on(device);
    RelaxedCapture relaxed;
    auto callers = reinterpret_cast<cudaStream_t>(stream);
    cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(callers, &capturing), "cudaStreamIsCapturing");
    if (capturing != cudaStreamCaptureStatusNone) {
        throw std::runtime_error("cannot save while a CUDA graph is being captured on the current stream");
    }
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    cudaError_t code = cudaEventRecord(event, callers);
    if (code != cudaSuccess) cudaEventDestroy(event);
    check(code, "cudaEventRecord");
    return event;
}

void drop(int, void* event) { cudaEventDestroy(static_cast<cudaEvent_t>(event)); }

void follow(void* stream, void* event) {
    check(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), static_cast<cudaEvent_t>(event), 0),
          "cudaStreamWaitEvent");
}

void gather(void* stream, const GatherTable& regions, int count) {
    if (count > 0) check(static_cast<cudaError_t>(launch_gather(regions, count, stream)), "gather kernel");
}

void copy(void* stream, const Region* regions, size_t count, bool mapped) {
    GatherTable small;
    int waiting = 0;
    bool kernels = mapped && count >= 8;
    for (size_t i = 0; i < count; ++i) {
        const Region& region = regions[i];
        if (kernels && region.nbytes < kSmall) {
            void* target = nullptr;
            check(cudaHostGetDevicePointer(&target, region.target, 0), "cudaHostGetDevicePointer");
            small.source[waiting] = static_cast<const unsigned char*>(region.source);
            small.target[waiting] = static_cast<unsigned char*>(target);
            small.nbytes[waiting] = region.nbytes;
            if (++waiting == kGatherRegions) {
                gather(stream, small, waiting);
                waiting = 0;
            }
        } else {
            check(cudaMemcpyAsync(region.target, region.source, region.nbytes, cudaMemcpyDeviceToHost,
                                  static_cast<cudaStream_t>(stream)),
                  "cudaMemcpyAsync");
        }
    }
    gather(stream, small, waiting);
}

void finish(void* stream) {
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync),
          "cudaEventCreateWithFlags");
    cudaError_t code = cudaEventRecord(event, static_cast<cudaStream_t>(stream));
    if (code == cudaSuccess) code = cudaEventSynchronize(event);
    cudaEventDestroy(event);
    check(code, "copying from the device");
}

void pin(void* data, uint64_t nbytes) {
    check(cudaHostRegister(data, nbytes, cudaHostRegisterPortable | cudaHostRegisterMapped),
          "cudaHostRegister");
}

void unpin(void* data) { cudaHostUnregister(data); }

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
    [](void*) {},
};

#endif

}  // namespace

const Table& table() { return kTable; }

}  // namespace roll::cuda
