// Finds lazy sources that were changed between save() and their copy.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_api.h"
#include "image.h"

namespace roll {

// How much of the bytes copied after save() is checked: nothing; 512 bytes of each extent in each block (of a
// random selection of extents where they are many and small); or every byte.
enum class Check { kOff, kSample, kFull };
Check check_named(const std::string& name);  // "off", "sample", "full"; throws std::invalid_argument

// The source of bytes [start, end) of the file was changed after save() and before it was copied.
struct SourceChanged : std::runtime_error {
    SourceChanged(const std::string& path, uint64_t start, uint64_t end);
    uint64_t start, end;
};

// Digests of lazy sources as they were when save() began: those of the host at construction; those of
// `devices` when their bytes have been fetched, for which save() waits too. A sample picks its bytes at
// random, so two checks of one image differ; it always has the end of the last extent in each block, which is
// copied last.
class SourceCheck {
  public:
    struct Piece {
        uint64_t start, end;  // in the file; within one extent and one block
        uint32_t crc;
        int32_t device;
        const uint8_t* source;
    };

    SourceCheck() = default;
    SourceCheck(const Image& image, uint64_t block_bytes, Check check, bool devices);
    // What is to be fetched from `device` of file bytes [start, end), each piece to where its copy will lie:
    // `target` holds these bytes of the file. Then digest(), before the copies are made. Each range once; any
    // thread, several ranges at a time.
    std::vector<cuda::Region> regions(uint64_t start, uint64_t end, int device, uint8_t* target) const;
    void digest(uint64_t start, uint64_t end, int device, const uint8_t* target);
    // The first piece within file bytes [start, end) whose copy differs from what its source held at
    // construction, or nullptr. `copied` holds the copy of these bytes. Any thread.
    const Piece* changed(uint64_t start, uint64_t end, const uint8_t* copied) const;

  private:
    template <class Visit>
    void for_each(uint64_t start, uint64_t end, int device, Visit visit) const;

    std::vector<Piece> pieces_;  // in file order
};

}  // namespace roll
