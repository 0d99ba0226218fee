#include "reader.h"

#include <algorithm>
#include <atomic>

#include "file.h"
#include "thread_pool.h"

namespace roll {
namespace {

constexpr uint64_t kPiece = 8 << 20;  // digest_file reads blocks larger than this in pieces

uint64_t blocks_of(uint64_t nbytes, uint64_t block_bytes) {
    if (block_bytes == 0) throw std::invalid_argument("block_bytes must be positive");
    return nbytes / block_bytes + (nbytes % block_bytes != 0);
}

// Direct I/O needs whole pages, even where the file ends within one.
uint64_t read_piece(File& file, uint8_t* data, uint64_t nbytes, uint64_t offset) {
    uint64_t padded = file.direct() ? round_up(nbytes, kPage) : nbytes;
    return std::min(nbytes, file.read_at(data, padded, offset));
}

std::string block_name(const std::string& path, uint64_t block, uint64_t start, uint64_t end) {
    return path + ": block " + std::to_string(block) + " (bytes " + std::to_string(start) + " to " +
           std::to_string(end) + ")";
}

[[noreturn]] void truncated(const std::string& path, uint64_t block, uint64_t start, uint64_t end,
                            uint64_t count) {
    throw DamagedFile(block_name(path, block, start, end) + " is cut short: the file ended " +
                      std::to_string(count) + " bytes into it while it was read");
}

// Runs work(block, start, end) for all blocks of a file on `threads` threads.
void for_each_block(uint64_t nbytes, uint64_t block_bytes, int threads, const std::function<bool()>& poll,
                    const std::function<void(uint64_t, uint64_t, uint64_t)>& work) {
    const uint64_t nblocks = blocks_of(nbytes, block_bytes);
    if (nblocks == 0) return;
    std::atomic<uint64_t> next{0};
    bool interrupted = false;
    auto on_thread = [&](const std::atomic<bool>& cancelled) {
        for (uint64_t block; !cancelled && (block = next++) < nblocks;) {
            uint64_t start = block * block_bytes;
            work(block, start, std::min(start + block_bytes, nbytes));
        }
    };
    int useful = static_cast<int>(std::min<uint64_t>(static_cast<uint64_t>(std::max(1, threads)), nblocks));
    in_parallel(useful, "roll-read", on_thread, [&] { return interrupted = interrupted || poll(); });
    if (interrupted) throw Cancelled{};
}

bool pages_only(uint64_t block_bytes) { return block_bytes % kPage == 0; }

}  // namespace

std::unique_ptr<Buffer> read_file(const std::string& path, uint64_t nbytes, uint64_t block_bytes,
                                  const std::optional<std::vector<uint32_t>>& crcs, int threads, bool direct,
                                  const std::function<bool()>& poll) {
    const uint64_t nblocks = blocks_of(nbytes, block_bytes);
    if (crcs && crcs->size() != nblocks) {
        throw std::invalid_argument(path + ": " + std::to_string(crcs->size()) + " block digests for " +
                                    std::to_string(nblocks) + " blocks");
    }
    File file = File::open(path, direct && pages_only(block_bytes));
    if (uint64_t size = file.size(); size != nbytes) {
        throw DamagedFile(path + ": " + std::to_string(size) + " bytes on disk where " +
                          std::to_string(nbytes) + " were written");
    }
    auto buffer = std::make_unique<Buffer>(nbytes);
    uint8_t* data = buffer->mapping.data();
    for_each_block(nbytes, block_bytes, threads, poll, [&](uint64_t block, uint64_t start, uint64_t end) {
        uint64_t count = read_piece(file, data + start, end - start, start);
        if (count < end - start) truncated(path, block, start, end, count);
        if (!crcs) return;
        uint32_t crc = crc32(data + start, end - start);
        if (crc != (*crcs)[block]) {
            throw DamagedFile(block_name(path, block, start, end) + " has CRC-32 " + std::to_string(crc) +
                              " where " + std::to_string((*crcs)[block]) + " was written");
        }
    });
    return buffer;
}

Digest digest_file(const std::string& path, uint64_t block_bytes, int threads, bool direct,
                   const std::function<bool()>& poll) {
    File file = File::open(path, direct && pages_only(block_bytes));
    Digest digest{file.size(), block_bytes, {}};
    digest.crcs.resize(blocks_of(digest.nbytes, block_bytes));
    const uint64_t piece = std::min(block_bytes, kPiece);
    for_each_block(digest.nbytes, block_bytes, threads, poll,
                   [&](uint64_t block, uint64_t start, uint64_t end) {
                       thread_local std::unique_ptr<Buffer> scratch;
                       if (!scratch || scratch->nbytes < piece) scratch = std::make_unique<Buffer>(piece);
                       uint32_t crc = 0;
                       for (uint64_t at = start; at < end; at += piece) {
                           uint64_t length = std::min(piece, end - at);
                           uint64_t count = read_piece(file, scratch->mapping.data(), length, at);
                           if (count < length) truncated(path, block, start, end, at - start + count);
                           crc = crc32(scratch->mapping.data(), length, crc);
                       }
                       digest.crcs[block] = crc;
                   });
    return digest;
}

}  // namespace roll
