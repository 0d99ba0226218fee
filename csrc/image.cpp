#include "image.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace roll {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("image: " + what); }

std::string range(uint64_t start, uint64_t nbytes) {
    return "[" + std::to_string(start) + ", +" + std::to_string(nbytes) + ")";
}

// Ranges must come in order, without overlap, inside the file.
template <class Range>
void check_order(const std::vector<Range>& ranges, uint64_t file_bytes, const char* kind,
                 uint64_t Range::* start, auto nbytes_of) {
    uint64_t end = 0;
    for (size_t i = 0; i < ranges.size(); ++i) {
        uint64_t first = ranges[i].*start, nbytes = nbytes_of(ranges[i]);
        auto name = [&] { return std::string(kind) + " " + std::to_string(i) + " " + range(first, nbytes); };
        if (nbytes > file_bytes || first > file_bytes - nbytes) {
            refuse(name() + " leaves the file of " + std::to_string(file_bytes) + " bytes");
        }
        if (first < end)
            refuse(name() + " starts before byte " + std::to_string(end) + ", where the one before it ends");
        end = first + nbytes;
    }
}

}  // namespace

Image::Image(uint64_t nbytes, std::vector<Extent> extents, std::vector<Record> records,
             std::vector<Stamp> stamps, std::map<int, int64_t> streams)
    : nbytes_(nbytes),
      extents_(std::move(extents)),
      records_(std::move(records)),
      stamps_(std::move(stamps)),
      streams_(std::move(streams)) {
    if (nbytes_ > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) / 2)
        refuse("impossible file size");
    check_order(extents_, nbytes_, "extent", &Extent::offset, [](const Extent& e) { return e.nbytes; });
    check_order(records_, nbytes_, "record", &Record::start, [](const Record& r) { return r.nbytes; });
    std::stable_sort(stamps_.begin(), stamps_.end(),
                     [](const Stamp& a, const Stamp& b) { return a.offset < b.offset; });
    check_order(stamps_, nbytes_, "patch", &Stamp::offset, [](const Stamp& s) { return s.nbytes(); });
    for (const Stamp& stamp : stamps_) {
        if (stamp.first > records_.size() || stamp.count > records_.size() - stamp.first) {
            refuse("patch at " + std::to_string(stamp.offset) + " names a record that is not there");
        }
        // Records are in order, so the last one ends last.
        if (stamp.count > 0 && records_[stamp.first + stamp.count - 1].end() > stamp.offset) {
            refuse("patch at " + std::to_string(stamp.offset) +
                   " lies before the end of a record it depends on");
        }
    }
    std::erase_if(extents_, [](const Extent& e) { return e.nbytes == 0; });
    for (const Extent& extent : extents_) {
        (extent.lazy ? lazy_bytes_ : eager_bytes_) += extent.nbytes;
        if (extent.leased) leased_bytes_ += extent.nbytes;
        if (extent.leased && (!extent.lazy || extent.device >= 0)) {
            refuse("extent at " + std::to_string(extent.offset) +
                   " is leased and not lazy memory of the host");
        }
        if (extent.device < -1) refuse("device " + std::to_string(extent.device));
        if (extent.address == 0) refuse("extent at " + std::to_string(extent.offset) + " has a null address");
        if (extent.device >= 0 &&
            std::find(devices_.begin(), devices_.end(), extent.device) == devices_.end()) {
            devices_.push_back(extent.device);
        }
    }
}

Sealer::Sealer(const Image& image, uint64_t block_bytes)
    : image_(image),
      block_bytes_(block_bytes),
      scanned_((image.nbytes() + block_bytes - 1) / block_bytes),
      record_crcs_(image.records().size(), 0) {}

// Cuts a block wherever a record or a stamp begins or ends, and visits the pieces in order.
template <class Visit>
void Sealer::for_each_segment(uint64_t block, Visit visit) const {
    uint64_t at = block * block_bytes_;
    const uint64_t end = std::min(at + block_bytes_, image_.nbytes());
    auto ends_by = [at](const auto& range) { return range.end() <= at; };
    auto record = std::partition_point(image_.records().begin(), image_.records().end(), ends_by);
    auto stamp = std::partition_point(image_.stamps().begin(), image_.stamps().end(), ends_by);
    while (at < end) {
        while (record != image_.records().end() && record->end() <= at) ++record;
        while (stamp != image_.stamps().end() && stamp->end() <= at) ++stamp;
        Segment piece{at, 0, nullptr, nullptr};
        uint64_t next = end;
        if (record != image_.records().end()) {
            bool inside = record->start <= at;
            if (inside) piece.record = &*record;
            next = std::min(next, inside ? record->end() : record->start);
        }
        if (stamp != image_.stamps().end()) {
            bool inside = stamp->offset <= at;
            if (inside) piece.stamp = &*stamp;
            next = std::min(next, inside ? stamp->end() : stamp->offset);
        }
        piece.nbytes = next - at;
        visit(piece);
        at = next;
    }
}

void Sealer::scan(uint64_t block, const uint8_t* data) {
    std::vector<uint32_t> crcs;
    for_each_segment(block, [&](const Segment& piece) {
        if (!piece.stamp) crcs.push_back(crc32(data + (piece.start - block * block_bytes_), piece.nbytes));
    });
    scanned_[block] = std::move(crcs);
}

uint32_t Sealer::seal(uint64_t block, uint8_t* data) {
    uint32_t block_crc = 0;
    auto scanned = scanned_[block].begin();
    for_each_segment(block, [&](const Segment& piece) {
        uint32_t crc;
        if (piece.stamp) {
            uint8_t* target = data + (piece.start - block * block_bytes_);
            // A stamp may begin in the block before this one.
            stamp_bytes(*piece.stamp)
                .copy(reinterpret_cast<char*>(target), piece.nbytes, piece.start - piece.stamp->offset);
            crc = crc32(target, piece.nbytes);
        } else {
            crc = *scanned++;
        }
        block_crc = crc32_combine(block_crc, crc, piece.nbytes);
        if (piece.record) {
            uint32_t& whole = record_crcs_[static_cast<size_t>(piece.record - image_.records().data())];
            whole = crc32_combine(whole, crc, piece.nbytes);
        }
    });
    scanned_[block] = {};
    return block_crc;
}

std::string Sealer::stamp_bytes(const Stamp& stamp) const {
    if (stamp.kind == Stamp::kCrc) {
        uint32_t crc = record_crcs_[stamp.first];
        std::string bytes(4, '\0');
        for (int i = 0; i < 4; ++i) bytes[static_cast<size_t>(i)] = static_cast<char>(crc >> (8 * i));
        return bytes;
    }
    uint64_t serial = 0;
    for (uint64_t i = 0; i < stamp.count; ++i) serial = serial_fold(serial, record_crcs_[stamp.first + i]);
    std::string digits = std::to_string(serial);
    return std::string(20 - digits.size(), '0') + digits;
}

}  // namespace roll
