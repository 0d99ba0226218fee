// Whether lazy sources stayed as they were from save() until they were copied.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "image.h"

namespace roll {

// How much of what is copied after save() is looked at: nothing, 512 bytes of each extent in each block (of a
// random part of them where they are many and small), all.
enum class Check { kOff, kSample, kFull };
Check check_named(const std::string& name);  // "off", "sample", "full"; throws std::invalid_argument

// Bytes [start, end) of the file came from a source that had been changed since save().
struct SourceChanged : std::runtime_error {
    SourceChanged(const std::string& path, uint64_t start, uint64_t end);
    uint64_t start, end;
};

// What lazy sources held when it was made, as digests; which bytes a sample takes differs from one to the
// next. Sources on a device are not looked at.
class Watch {
  public:
    struct Piece {
        uint64_t start, end;  // in the file; of one extent, in one block
        uint32_t crc;
    };

    Watch() = default;
    Watch(const Image& image, uint64_t block_bytes, Check check);
    // The first piece in file bytes [start, end) that was copied otherwise than it was seen, or nullptr.
    // `copied` holds these bytes. Any thread.
    const Piece* changed(uint64_t start, uint64_t end, const uint8_t* copied) const;

  private:
    std::vector<Piece> pieces_;  // in file order
};

}  // namespace roll
