#include <cuda_runtime.h>

#include "gather.h"

namespace roll::cuda {
namespace {

constexpr int kThreads = 256;

// One thread block a region. Sixteen bytes at a time where source and target allow it, else single bytes.
__global__ void __launch_bounds__(kThreads) gather(const __grid_constant__ GatherTable regions) {
    const unsigned char* source = regions.source[blockIdx.x];
    unsigned char* target = regions.target[blockIdx.x];
    uint64_t nbytes = regions.nbytes[blockIdx.x];
    uint64_t done = 0;
    if (((reinterpret_cast<uintptr_t>(source) | reinterpret_cast<uintptr_t>(target)) & 15) == 0) {
        uint64_t words = nbytes / 16;
        const uint4* from = reinterpret_cast<const uint4*>(source);
        uint4* to = reinterpret_cast<uint4*>(target);
        for (uint64_t i = threadIdx.x; i < words; i += kThreads) to[i] = from[i];
        done = words * 16;
    }
    for (uint64_t i = done + threadIdx.x; i < nbytes; i += kThreads) target[i] = source[i];
}

}  // namespace

int launch_gather(const GatherTable& regions, int count, void* stream) {
    gather<<<count, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(regions);
    return cudaPeekAtLastError();
}

}  // namespace roll::cuda
