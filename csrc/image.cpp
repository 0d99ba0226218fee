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
            refuse(name() + " reaches past the end of the file of " + std::to_string(file_bytes) + " bytes");
        }
        if (first < end)
            refuse(name() + " starts before byte " + std::to_string(end) + ", where the previous one ends");
        end = first + nbytes;
    }
}

}  // namespace

Image::Image(uint64_t nbytes, std::vector<Extent> extents, std::vector<Record> records,
             std::vector<CrcPatch> patches, std::map<int, int64_t> streams)
    : nbytes_(nbytes),
      extents_(std::move(extents)),
      records_(std::move(records)),
      patches_(std::move(patches)),
      streams_(std::move(streams)) {
    if (nbytes_ > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) / 2)
        refuse("a file of " + std::to_string(nbytes_) + " bytes is impossible");
    check_order(extents_, nbytes_, "extent", &Extent::offset, [](const Extent& e) { return e.nbytes; });
    check_order(records_, nbytes_, "record", &Record::start, [](const Record& r) { return r.nbytes; });
    std::stable_sort(patches_.begin(), patches_.end(),
                     [](const CrcPatch& a, const CrcPatch& b) { return a.offset < b.offset; });
    check_order(patches_, nbytes_, "patch", &CrcPatch::offset, [](const CrcPatch& s) { return s.nbytes(); });
    for (const CrcPatch& patch : patches_) {
        if (patch.first > records_.size() || patch.count > records_.size() - patch.first) {
            refuse("patch at " + std::to_string(patch.offset) + " names a record that does not exist");
        }
        // Records are in order, so the last one ends last.
        if (patch.count > 0 && records_[patch.first + patch.count - 1].end() > patch.offset) {
            refuse("patch at " + std::to_string(patch.offset) +
                   " lies before the end of a record it depends on");
        }
    }
    std::erase_if(extents_, [](const Extent& e) { return e.nbytes == 0; });
    for (const Extent& extent : extents_) {
        (extent.lazy ? lazy_bytes_ : eager_bytes_) += extent.nbytes;
        if (extent.borrowed) borrowed_bytes_ += extent.nbytes;
        if (extent.borrowed && (!extent.lazy || extent.device >= 0)) {
            refuse("extent at " + std::to_string(extent.offset) +
                   " is borrowed, but not lazy memory of the host");
        }
        if (extent.device < -1) {
            refuse("extent at " + std::to_string(extent.offset) + " names device " +
                   std::to_string(extent.device));
        }
        if (extent.address == 0) refuse("extent at " + std::to_string(extent.offset) + " has a null address");
        if (extent.device >= 0 &&
            std::find(devices_.begin(), devices_.end(), extent.device) == devices_.end()) {
            devices_.push_back(extent.device);
        }
    }
}

CrcPatcher::CrcPatcher(const Image& image, uint64_t block_bytes)
    : image_(image),
      block_bytes_(block_bytes),
      scanned_((image.nbytes() + block_bytes - 1) / block_bytes),
      record_crcs_(image.records().size(), 0) {}

// Cuts a block wherever a record or a patch begins or ends, and visits the segments in order.
template <class Visit>
void CrcPatcher::for_each_segment(uint64_t block, Visit visit) const {
    uint64_t at = block * block_bytes_;
    const uint64_t end = std::min(at + block_bytes_, image_.nbytes());
    auto ends_by = [at](const auto& range) { return range.end() <= at; };
    auto record = std::partition_point(image_.records().begin(), image_.records().end(), ends_by);
    auto patch = std::partition_point(image_.patches().begin(), image_.patches().end(), ends_by);
    while (at < end) {
        while (record != image_.records().end() && record->end() <= at) ++record;
        while (patch != image_.patches().end() && patch->end() <= at) ++patch;
        Segment segment{at, 0, nullptr, nullptr};
        uint64_t next = end;
        if (record != image_.records().end()) {
            bool inside = record->start <= at;
            if (inside) segment.record = &*record;
            next = std::min(next, inside ? record->end() : record->start);
        }
        if (patch != image_.patches().end()) {
            bool inside = patch->offset <= at;
            if (inside) segment.patch = &*patch;
            next = std::min(next, inside ? patch->end() : patch->offset);
        }
        segment.nbytes = next - at;
        visit(segment);
        at = next;
    }
}

void CrcPatcher::scan(uint64_t block, const uint8_t* data) {
    std::vector<uint32_t> crcs;
    for_each_segment(block, [&](const Segment& segment) {
        if (!segment.patch)
            crcs.push_back(crc32(data + (segment.start - block * block_bytes_), segment.nbytes));
    });
    scanned_[block] = std::move(crcs);
}

uint32_t CrcPatcher::patch(uint64_t block, uint8_t* data) {
    uint32_t block_crc = 0;
    auto scanned = scanned_[block].begin();
    for_each_segment(block, [&](const Segment& segment) {
        uint32_t crc;
        if (segment.patch) {
            uint8_t* target = data + (segment.start - block * block_bytes_);
            // The patch may have begun in the previous block.
            bytes_of(*segment.patch)
                .copy(reinterpret_cast<char*>(target), segment.nbytes, segment.start - segment.patch->offset);
            crc = crc32(target, segment.nbytes);
        } else {
            crc = *scanned++;
        }
        block_crc = crc32_combine(block_crc, crc, segment.nbytes);
        if (segment.record) {
            uint32_t& whole = record_crcs_[static_cast<size_t>(segment.record - image_.records().data())];
            whole = crc32_combine(whole, crc, segment.nbytes);
        }
    });
    scanned_[block] = {};
    return block_crc;
}

std::string CrcPatcher::bytes_of(const CrcPatch& patch) const {
    if (patch.kind == CrcPatch::kCrc) {
        uint32_t crc = record_crcs_[patch.first];
        std::string bytes(4, '\0');
        for (int i = 0; i < 4; ++i) bytes[static_cast<size_t>(i)] = static_cast<char>(crc >> (8 * i));
        return bytes;
    }
    uint64_t serial = 0;
    for (uint64_t i = 0; i < patch.count; ++i) serial = serial_fold(serial, record_crcs_[patch.first + i]);
    std::string digits = std::to_string(serial);
    return std::string(20 - digits.size(), '0') + digits;
}

}  // namespace roll
