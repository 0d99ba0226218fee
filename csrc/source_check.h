// Finds lazy sources that were changed between save() and their copy.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

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

// Digests of lazy sources as they were at construction. A sample picks its bytes at random, so two checks of
// one image differ. Sources on a device are not checked.
class SourceCheck {
  public:
    struct Piece {
        uint64_t start, end;  // in the file; within one extent and one block
        uint32_t crc;
    };

    SourceCheck() = default;
    SourceCheck(const Image& image, uint64_t block_bytes, Check check);
    // The first piece within file bytes [start, end) whose copy differs from what its source held at
    // construction, or nullptr. `copied` holds the copy of these bytes. Any thread.
    const Piece* changed(uint64_t start, uint64_t end, const uint8_t* copied) const;

  private:
    std::vector<Piece> pieces_;  // in file order
};

}  // namespace roll
