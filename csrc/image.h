// What a file will hold and where its bytes come from: plain numbers, checked once in the constructor,
// immutable.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "digest.h"

namespace roll {

// nbytes of the file at `offset` come from memory at `address` of the host (device -1) or of a CUDA device.
// A lazy extent may be copied after save() has returned; an eager one is copied before. A borrowed extent is
// lazy, lies on the host, and may be read until it is written: it may never be copied at all.
struct Extent {
    uint64_t offset, address, nbytes;
    bool lazy;
    int32_t device;
    bool borrowed = false;
    uint64_t end() const { return offset + nbytes; }
};

// A range of the file whose CRC-32 is written into the file itself.
struct Record {
    uint64_t start, nbytes;
    uint64_t end() const { return start + nbytes; }
};

// Bytes of the file that are computed from the CRCs of records before them: one CRC as a little-endian 32-bit
// integer, or a serial of several CRCs (see serial_fold) as twenty decimal digits.
struct CrcPatch {
    enum Kind { kCrc, kSerial } kind;
    uint64_t offset;        // in the file
    uint64_t first, count;  // the records it is computed from; a CRC has one
    uint64_t nbytes() const { return kind == kCrc ? 4 : 20; }
    uint64_t end() const { return offset + nbytes(); }
};

// The constructor throws std::invalid_argument for extents, records or patches that are out of order, overlap
// or reach past the end of the file, and for a patch that does not lie behind all records it depends on.
// Bytes that no extent covers are 0.
class Image {
  public:
    Image(uint64_t nbytes, std::vector<Extent> extents, std::vector<Record> records,
          std::vector<CrcPatch> patches, std::map<int, int64_t> streams);

    uint64_t nbytes() const { return nbytes_; }
    uint64_t lazy_bytes() const { return lazy_bytes_; }
    uint64_t eager_bytes() const { return eager_bytes_; }
    uint64_t borrowed_bytes() const { return borrowed_bytes_; }  // of lazy_bytes()
    const std::vector<Extent>& extents() const { return extents_; }
    const std::vector<Record>& records() const { return records_; }
    const std::vector<CrcPatch>& patches() const { return patches_; }  // in file order
    const std::vector<int>& devices() const { return devices_; }
    const std::map<int, int64_t>& streams() const { return streams_; }  // device -> caller's stream

  private:
    uint64_t nbytes_, lazy_bytes_ = 0, eager_bytes_ = 0, borrowed_bytes_ = 0;
    std::vector<Extent> extents_;
    std::vector<Record> records_;
    std::vector<CrcPatch> patches_;
    std::vector<int> devices_;
    std::map<int, int64_t> streams_;
};

// Folds one more CRC into a serial. The fold over the CRCs of all records, starting at 0, in twenty decimal
// digits is what torch.save writes as the second half of .data/serialization_id.
constexpr uint64_t serial_fold(uint64_t serial, uint32_t crc) {
    return serial ^ (crc + 0x9e3779b9ull + (serial << 6) + (serial >> 2));
}

// Computes the CRCs of one image's records and blocks, block by block, and writes its patches into the
// blocks.
class CrcPatcher {
  public:
    CrcPatcher(const Image& image, uint64_t block_bytes);

    // Computes the CRCs of one block. Each block once; any thread, several blocks at a time.
    void scan(uint64_t block, const uint8_t* data);
    // After scan() of the block, one block at a time, in file order: writes the block's patches into `data`
    // and returns the CRC-32 of the block. A block without a patch is neither read nor written.
    uint32_t patch(uint64_t block, uint8_t* data);

  private:
    struct Segment {
        uint64_t start, nbytes;
        const Record* record;   // or nullptr
        const CrcPatch* patch;  // or nullptr
    };
    template <class Visit>
    void for_each_segment(uint64_t block, Visit visit) const;
    std::string bytes_of(const CrcPatch& patch) const;

    const Image& image_;
    uint64_t block_bytes_;
    std::vector<std::vector<uint32_t>> scanned_;  // per block: CRCs of the segments that hold no patch
    std::vector<uint32_t> record_crcs_;
};

}  // namespace roll
