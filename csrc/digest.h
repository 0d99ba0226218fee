// CRC-32 as zip and zlib define it (polynomial 0xEDB88320, reflected). Pure functions, any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace roll {

// The CRC-32 of the bytes that gave `start`, followed by these. crc32(p, n) equals zlib.crc32.
uint32_t crc32(const void* data, size_t nbytes, uint32_t start = 0);

// The portable form of the same function, eight bytes a step.
uint32_t crc32_portable(const void* data, size_t nbytes, uint32_t start = 0);

// The CRC-32 of A followed by B, given both CRCs and the length of B.
uint32_t crc32_combine(uint32_t a, uint32_t b, uint64_t nbytes_b);

// The CRC-32 of each block of a file. A block is block_bytes long, the last one may be shorter, and an empty
// file has no block.
struct Digest {
    uint64_t nbytes = 0;
    uint64_t block_bytes = 0;
    std::vector<uint32_t> crcs;
};

}  // namespace roll
