// The kernel's side of cuda_api.cpp.
#pragma once

#include <cstdint>

namespace roll::cuda {

constexpr int kGatherRegions = 128;  // the table is a kernel argument, which CUDA limits to 4 KiB

struct GatherTable {
    const unsigned char* source[kGatherRegions];
    unsigned char* target[kGatherRegions];
    uint64_t nbytes[kGatherRegions];
};

// Loads the kernel onto the current device; returns a cudaError_t, cudaErrorNoKernelImageForDevice if the
// device is older than every target it was compiled for.
int load_gather();
// Queues one kernel that copies `count` regions; returns a cudaError_t.
int launch_gather(const GatherTable& regions, int count, void* stream);

}  // namespace roll::cuda
