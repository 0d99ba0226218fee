// The kernel's side of cuda_api.cpp.
#pragma once

#include <cstdint>

namespace roll::cuda {

constexpr int kGatherRegions = 128;  // the table travels as kernel argument, which CUDA limits to 4 KiB

struct GatherTable {
    const unsigned char* source[kGatherRegions];
    unsigned char* target[kGatherRegions];
    uint64_t nbytes[kGatherRegions];
};

// Both return a cudaError_t. Loads the kernel onto the current device; one too old for every target it was
// compiled for has cudaErrorNoKernelImageForDevice.
int load_gather();
// Queues one kernel that copies `count` regions.
int launch_gather(const GatherTable& regions, int count, void* stream);

}  // namespace roll::cuda
