#include <cuda_runtime.h>

#include "gather.h"

namespace roll::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 32;  // enough to fill the bus; most multiprocessors stay with training

// Copies as many whole words as nbytes hold, if source and target are aligned for them; returns the bytes
// copied.
template <class Word>
__device__ uint64_t copy_as(const unsigned char* source, unsigned char* target, uint64_t nbytes) {
    if ((reinterpret_cast<uintptr_t>(source) | reinterpret_cast<uintptr_t>(target)) % sizeof(Word)) return 0;
    const uint64_t words = nbytes / sizeof(Word);
    const Word* from = reinterpret_cast<const Word*>(source);
    Word* to = reinterpret_cast<Word*>(target);
    for (uint64_t i = threadIdx.x; i < words; i += kThreads) to[i] = from[i];
    return words * sizeof(Word);
}

// Each thread block copies one region after another, in the widest words that its alignment allows.
__global__ void __launch_bounds__(kThreads)
    gather(const __grid_constant__ GatherTable regions, const int count) {
    for (int i = blockIdx.x; i < count; i += gridDim.x) {
        const unsigned char* source = regions.source[i];
        unsigned char* target = regions.target[i];
        const uint64_t nbytes = regions.nbytes[i];
        uint64_t done = copy_as<uint4>(source, target, nbytes);
        done += copy_as<uint32_t>(source + done, target + done, nbytes - done);
        copy_as<unsigned char>(source + done, target + done, nbytes - done);
    }
}

}  // namespace

int load_gather() {
    cudaFuncAttributes unused;
    return cudaFuncGetAttributes(&unused, gather);
}

int launch_gather(const GatherTable& regions, int count, void* stream) {
    void* arguments[] = {const_cast<GatherTable*>(&regions), &count};
    const int blocks = count < kBlocks ? count : kBlocks;
    return cudaLaunchKernel(reinterpret_cast<const void*>(&gather), dim3(blocks), dim3(kThreads), arguments,
                            0, static_cast<cudaStream_t>(stream));
}

}  // namespace roll::cuda
