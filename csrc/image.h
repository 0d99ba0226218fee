// What a file will hold and where its bytes come from: plain numbers, checked once, never changed.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "digest.h"

namespace roll {

// nbytes of the file at `offset` come from memory at `address` of the host (device -1) or a CUDA device.
// A lazy extent may be copied after save() returned; any other is copied before. A leased one is lazy, lies
// on the host, and may be read until it is written: perhaps it is never copied.
struct Extent {
    uint64_t offset, address, nbytes;
    bool lazy;
    int32_t device;
    bool leased = false;
    uint64_t end() const { return offset + nbytes; }
};

// A range of the file whose CRC-32 is needed inside the file.
struct Record {
    uint64_t start, nbytes;
    uint64_t end() const { return start + nbytes; }
};

// Bytes of the file that follow from CRCs of records before them.
struct Stamp {
    enum Kind { kCrc, kSerial } kind;
    uint64_t offset, first, count;  // of the records it is made of; a CRC has one
    uint64_t nbytes() const { return kind == kCrc ? 4 : 20; }
    uint64_t end() const { return offset + nbytes(); }
};

// The constructor throws std::invalid_argument for extents, records or stamps that are out of order, overlap
// or leave the file, and for a stamp that does not lie behind all records it depends on. Bytes of no extent
// are 0.
class Image {
  public:
    Image(uint64_t nbytes, std::vector<Extent> extents, std::vector<Record> records,
          std::vector<Stamp> stamps, std::map<int, int64_t> streams);

    uint64_t nbytes() const { return nbytes_; }
    uint64_t lazy_bytes() const { return lazy_bytes_; }
    uint64_t eager_bytes() const { return eager_bytes_; }
    uint64_t leased_bytes() const { return leased_bytes_; }  // of lazy_bytes()
    const std::vector<Extent>& extents() const { return extents_; }
    const std::vector<Record>& records() const { return records_; }
    const std::vector<Stamp>& stamps() const { return stamps_; }  // in file order
    const std::vector<int>& devices() const { return devices_; }
    const std::map<int, int64_t>& streams() const { return streams_; }  // device -> caller's stream

  private:
    uint64_t nbytes_, lazy_bytes_ = 0, eager_bytes_ = 0, leased_bytes_ = 0;
    std::vector<Extent> extents_;
    std::vector<Record> records_;
    std::vector<Stamp> stamps_;
    std::vector<int> devices_;
    std::map<int, int64_t> streams_;
};

// Folds one more CRC into a serial. Twenty decimal digits of the fold over all records, from 0, are what
// torch.save writes as the second half of .data/serialization_id.
constexpr uint64_t serial_fold(uint64_t serial, uint32_t crc) {
    return serial ^ (crc + 0x9e3779b9ull + (serial << 6) + (serial >> 2));
}

// Computes record CRCs and block CRCs while the blocks of one image pass by, and fills the stamps in.
class Sealer {
  public:
    Sealer(const Image& image, uint64_t block_bytes);

    // Reads a block; any thread, several blocks at once, each block once.
    void scan(uint64_t block, const uint8_t* data);
    // After scan, one block at a time, in file order: writes the stamps of the block and returns its CRC-32.
    // `data` is not looked at in a block without a stamp.
    uint32_t seal(uint64_t block, uint8_t* data);

  private:
    struct Segment {
        uint64_t start, nbytes;
        const Record* record;  // or nullptr
        const Stamp* stamp;    // or nullptr
    };
    template <class Visit>
    void for_each_segment(uint64_t block, Visit visit) const;
    std::string stamp_bytes(const Stamp& stamp) const;

    const Image& image_;
    uint64_t block_bytes_;
    std::vector<std::vector<uint32_t>> scanned_;  // per block: CRCs of the segments that hold no stamp
    std::vector<uint32_t> record_crcs_;
};

}  // namespace roll
