#include "source_check.h"

#include <algorithm>
#include <random>

#include "digest.h"

namespace roll {
namespace {

constexpr uint64_t kSampleBytes = 512;

// A sample costs half a microsecond whatever its size: this many take less than 1 % of the time of the
// copies.
uint64_t most_samples(uint64_t nbytes) { return 512 + (nbytes >> 21); }

}  // namespace

Check check_named(const std::string& name) {
    if (name == "off") return Check::kOff;
    if (name == "sample") return Check::kSample;
    if (name == "full") return Check::kFull;
    throw std::invalid_argument("check is '" + name + "': give off, sample or full");
}

SourceChanged::SourceChanged(const std::string& path, uint64_t start, uint64_t end)
    : std::runtime_error(path + ": the source of bytes " + std::to_string(start) + " to " +
                         std::to_string(end) + " was changed before it was copied"),
      start(start),
      end(end) {}

SourceCheck::SourceCheck(const Image& image, uint64_t block_bytes, Check check, bool devices) {
    if (check == Check::kOff) return;
    std::minstd_rand random{std::random_device{}()};
    const uint64_t candidates = image.extents().size() + image.lazy_bytes() / block_bytes;
    auto add = [&](const Extent& extent, uint64_t start, uint64_t end) {
        auto source = reinterpret_cast<const uint8_t*>(extent.address) + (start - extent.offset);
        const uint32_t crc = extent.device < 0 ? crc32(source, end - start) : 0;
        pieces_.push_back({start, end, crc, extent.device, source});
    };
    const auto& extents = image.extents();
    for (size_t i = 0; i < extents.size(); ++i) {
        const Extent& extent = extents[i];
        if (!extent.lazy || (extent.device >= 0 && !devices)) continue;
        for (uint64_t at = extent.offset, next; at < extent.end(); at = next) {
            const uint64_t block_end = (at / block_bytes + 1) * block_bytes;
            next = std::min(extent.end(), block_end);
            if (check == Check::kFull) {
                add(extent, at, next);
                continue;
            }
            const bool last = next == block_end || i + 1 == extents.size() || !extents[i + 1].lazy ||
                              extents[i + 1].offset >= block_end;
            const uint64_t tail = last ? next - std::min(next - at, kSampleBytes) : next;
            if (at < tail && random() % candidates < most_samples(image.lazy_bytes())) {
                const uint64_t nbytes = std::min(tail - at, kSampleBytes);
                const uint64_t start = at + random() % (tail - at - nbytes + 1);
                add(extent, start, start + nbytes);
            }
            if (last) add(extent, tail, next);
        }
    }
}

template <class Visit>
void SourceCheck::for_each(uint64_t start, uint64_t end, int device, Visit visit) const {
    auto piece =
        std::partition_point(pieces_.begin(), pieces_.end(), [&](const Piece& p) { return p.end <= start; });
    for (; piece != pieces_.end() && piece->start < end; ++piece) {
        if (piece->device == device) visit(*piece);
    }
}

std::vector<cuda::Region> SourceCheck::regions(uint64_t start, uint64_t end, int device,
                                               uint8_t* target) const {
    std::vector<cuda::Region> regions;
    for_each(start, end, device, [&](const Piece& p) {
        regions.push_back({p.source, target + (p.start - start), p.end - p.start});
    });
    return regions;
}

void SourceCheck::digest(uint64_t start, uint64_t end, int device, const uint8_t* target) {
    for_each(start, end, device, [&](const Piece& p) {
        pieces_[static_cast<size_t>(&p - pieces_.data())].crc =
            crc32(target + (p.start - start), p.end - p.start);
    });
}

const SourceCheck::Piece* SourceCheck::changed(uint64_t start, uint64_t end, const uint8_t* copied) const {
    auto piece =
        std::partition_point(pieces_.begin(), pieces_.end(), [&](const Piece& p) { return p.end <= start; });
    for (; piece != pieces_.end() && piece->start < end; ++piece) {
        if (crc32(copied + (piece->start - start), piece->end - piece->start) != piece->crc) return &*piece;
    }
    return nullptr;
}

}  // namespace roll
