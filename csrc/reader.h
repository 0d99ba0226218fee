// Reads whole files in parallel, checking every block as it lands.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "arena.h"
#include "digest.h"

namespace roll {

// The bytes on disk are not the bytes that were written.
struct DamagedFile : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Cancelled {};

// The bytes of a file in a mapping of their own (huge pages).
struct Buffer {
    explicit Buffer(uint64_t nbytes) : mapping(nbytes), nbytes(nbytes) {}
    Mapping mapping;
    uint64_t nbytes;
};

// Reads `nbytes` with one read in flight per thread, each byte once. Throws DamagedFile, with path and block,
// if the file has another size or a block another CRC; FileError if it cannot be read; Cancelled once poll()
// is true.
std::unique_ptr<Buffer> read_file(const std::string& path, uint64_t nbytes, uint64_t block_bytes,
                                  const std::optional<std::vector<uint32_t>>& crcs, int threads, bool direct,
                                  const std::function<bool()>& poll);

// The digest of the file as it is now. FileError if it cannot be read; DamagedFile if it shrinks meanwhile;
// Cancelled once poll() is true.
Digest digest_file(const std::string& path, uint64_t block_bytes, int threads, bool direct,
                   const std::function<bool()>& poll);

}  // namespace roll
