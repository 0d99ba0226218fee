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

SourceCheck::SourceCheck(const Image& image, uint64_t block_bytes, Check check) {
    if (check == Check::kOff) return;
    std::minstd_rand random{std::random_device{}()};
    const uint64_t candidates = image.extents().size() + image.lazy_bytes() / block_bytes;
    for (const Extent& extent : image.extents()) {
        if (!extent.lazy || extent.device >= 0) continue;
        for (uint64_t at = extent.offset, next; at < extent.end(); at = next) {
            next = std::min(extent.end(), (at / block_bytes + 1) * block_bytes);
            Piece piece{at, next, 0};
            if (check == Check::kSample) {
                if (random() % candidates >= most_samples(image.lazy_bytes())) continue;
                if (next - at > kSampleBytes) {
                    piece.start += random() % (next - at - kSampleBytes + 1);
                    piece.end = piece.start + kSampleBytes;
                }
            }
            auto source = reinterpret_cast<const uint8_t*>(extent.address) + (piece.start - extent.offset);
            piece.crc = crc32(source, piece.end - piece.start);
            pieces_.push_back(piece);
        }
    }
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
