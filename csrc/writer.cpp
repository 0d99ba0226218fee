#include "writer.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace roll {
namespace {

constexpr int kBackgroundNice = 10;
constexpr auto kGrace = std::chrono::seconds(5);  // for one write in flight, after a transfer was stopped

double seconds_since(Clock::time_point begin) {
    return std::chrono::duration<double>(Clock::now() - begin).count();
}

}  // namespace

Transfer::Transfer(Mover& mover, std::string path, std::shared_ptr<const Image> image)
    : mover_(mover),
      path_(std::move(path)),
      image_(std::move(image)),
      block_bytes_(mover.arena_->block_bytes()),
      nblocks_((image_->nbytes() + block_bytes_ - 1) / block_bytes_),
      sealer_(*image_, block_bytes_),
      blocks_(nblocks_),
      crcs_(nblocks_, 0) {}

Transfer::~Transfer() {
    for (auto& [device, event] : events_) cuda::table().drop(device, event);
}

void Transfer::start(bool overlap, Check check) {
    for (int device : image_->devices()) {
        auto stream = image_->streams().find(device);
        events_[device] =
            cuda::table().record(device, stream == image_->streams().end() ? 0 : stream->second);
    }
    auto self = shared_from_this();
    // Opened in the background but first, so that a full disk is known before the bytes arrive.
    mover_.io_.submit([self] {
        try {
            self->open_early();
        } catch (...) {
            self->fail(std::current_exception());
        }
    });
    std::vector<uint8_t*> slots;
    if (overlap && image_->lazy_bytes() > 0 && mover_.arena_->try_lease(nblocks_, slots)) {
        {
            std::lock_guard lock(mutex_);
            overlapped_ = true;
        }
        watch_ = Watch(*image_, block_bytes_, check);  // before any copy, while the caller is in save()
        add_blocks(slots);
    }
    std::lock_guard lock(mutex_);
    note_progress();
    finish_if_through();
}

// Gives the next blocks their slots and queues their copies.
void Transfer::add_blocks(const std::vector<uint8_t*>& slots) {
    std::vector<Chunk> chunks;
    std::vector<DeviceCopy> device_copies;
    {
        std::lock_guard lock(mutex_);
        if (stopped_) {  // nothing may begin after a stop: the threads may already be ending
            for (uint8_t* slot : slots) mover_.arena_->give_back(slot);
            return;
        }
        for (uint8_t* slot : slots) {
            uint64_t block = leased_++;
            size_t before = chunks.size() + device_copies.size();
            if (overlapped_) {
                list_copies(block, kEager, true, chunks, device_copies);
                urgent_left_ += chunks.size() + device_copies.size() - before;
                list_copies(block, kLazy, false, chunks, device_copies);
            } else {
                list_copies(block, kEverything, true, chunks, device_copies);
                urgent_left_ += chunks.size() + device_copies.size() - before;
            }
            blocks_[block].slot = slot;
            blocks_[block].copies_left = static_cast<uint32_t>(chunks.size() + device_copies.size() - before);
            copies_left_ += blocks_[block].copies_left;
        }
    }
    auto self = shared_from_this();
    for (const DeviceCopy& copy : device_copies) {
        mover_.copier_.submit_device(copy.device, [self, copy](void* stream, const std::string& error) {
            self->copy_from_device(copy, stream, error);
        });
    }
    mover_.copier_.submit(self, chunks);
}

void Transfer::list_copies(uint64_t block, Pass pass, bool urgent, std::vector<Chunk>& chunks,
                           std::vector<DeviceCopy>& device_copies) const {
    const uint64_t end = end_of(block);
    for (uint64_t from = start_of(block); from < end; from += kChunkBytes) {
        uint64_t to = std::min(from + kChunkBytes, end);
        if (has_host_bytes(*image_, from, to, pass)) chunks.push_back({block, from, to, pass, urgent});
    }
    for (int device : image_->devices()) {
        if (!device_regions(*image_, start_of(block), end, pass, device, nullptr).empty()) {
            device_copies.push_back({block, pass, device, urgent});
        }
    }
}

void Transfer::copy(const Chunk& chunk) noexcept {
    if (!stopped_) {
        uint8_t* target = blocks_[chunk.block].slot + (chunk.start - start_of(chunk.block));
        copy_host_bytes(*image_, chunk.start, chunk.end, chunk.pass, target);
    }
    copy_ended(chunk.block, chunk.urgent);
}

void Transfer::copy_from_device(const DeviceCopy& copy, void* stream, const std::string& error) noexcept {
    std::string failure = error;
    if (!stopped_ && stream) {
        const cuda::Table& cuda = cuda::table();
        uint8_t* slot = blocks_[copy.block].slot;
        const bool pinned = mover_.arena_->pin(copy.device, slot);
        try {
            auto regions = device_regions(*image_, start_of(copy.block), end_of(copy.block), copy.pass,
                                          copy.device, slot);
            cuda.follow(stream, events_.at(copy.device));
            cuda.copy(stream, regions.data(), regions.size(), pinned);
        } catch (const std::exception& thrown) {
            failure = thrown.what();
        }
        // Whatever was queued must have ended before the slot or the source may be used for anything else.
        try {
            cuda.finish(stream);
        } catch (const std::exception& thrown) {
            if (failure.empty()) failure = thrown.what();
        }
    }
    if (!failure.empty()) {
        fail(std::make_exception_ptr(FileError(
            EIO, "copying from CUDA device " + std::to_string(copy.device) + ": " + failure, path_)));
    }
    copy_ended(copy.block, copy.urgent);
}

void Transfer::copy_ended(uint64_t block, bool urgent) {
    bool block_is_full;
    {
        std::lock_guard lock(mutex_);
        --copies_left_;
        if (urgent) --urgent_left_;
        block_is_full = --blocks_[block].copies_left == 0;
        note_progress();
    }
    if (block_is_full) mover_.digests_.submit([self = shared_from_this(), block] { self->scan(block); });
}

// Digests one block, then seals those whose turn has come. Whoever finds another thread sealing leaves it to
// it.
void Transfer::scan(uint64_t block) noexcept {
    try {
        if (!stopped_) {
            const uint8_t* slot = blocks_[block].slot;
            sealer_.scan(block, slot);
            if (auto piece = watch_.changed(start_of(block), end_of(block), slot)) {
                throw SourceChanged(path_, piece->start, piece->end);
            }
        }
    } catch (...) {
        fail(std::current_exception());
    }
    std::unique_lock lock(mutex_);
    blocks_[block].scanned = true;
    if (sealing_) return;
    sealing_ = true;
    while (next_to_seal_ < nblocks_ && blocks_[next_to_seal_].scanned) {
        const uint64_t next = next_to_seal_;
        lock.unlock();
        uint32_t crc = 0;
        try {
            if (!stopped_) crc = sealer_.seal(next, blocks_[next].slot);
        } catch (...) {
            fail(std::current_exception());
        }
        lock.lock();
        crcs_[next] = crc;  // before the write: once the last block is written the digest is read
        ++next_to_seal_;
        lock.unlock();
        mover_.io_.submit([self = shared_from_this(), next] { self->write(next); });
        lock.lock();
    }
    sealing_ = false;
}

void Transfer::write(uint64_t block) noexcept {
    uint8_t* slot = blocks_[block].slot;
    try {
        if (!stopped_) {
            File& file = opened();
            const uint64_t nbytes = end_of(block) - start_of(block);
            const uint64_t padded = file.direct() ? round_up(nbytes, kPage) : nbytes;
            std::memset(slot + nbytes, 0, padded - nbytes);
            file.write_at(slot, padded, start_of(block));
        }
    } catch (...) {
        fail(std::current_exception());
    }
    mover_.arena_->give_back(slot);
    std::lock_guard lock(mutex_);
    ++through_;
    finish_if_through();
}

// Its thread may get a processor only after the others have written and closed the file: to open it again
// then would empty it.
void Transfer::open_early() {
    std::lock_guard lock(file_mutex_);
    if (!closed_ && !stopped_) open();
}

File& Transfer::opened() {
    std::lock_guard lock(file_mutex_);
    open();
    return *file_;
}

// With file_mutex_ held.
void Transfer::open() {
    if (open_error_) std::rethrow_exception(open_error_);
    if (!file_) {
        try {
            auto file = std::make_unique<File>(File::create(path_, mover_.direct_));
            file->allocate(file->direct() ? round_up(image_->nbytes(), kPage) : image_->nbytes());
            file_ = std::move(file);
        } catch (...) {
            open_error_ = std::current_exception();
            throw;
        }
    }
}

void Transfer::finish() noexcept {
    bool direct = false;
    try {
        if (!stopped_) {
            File& file = opened();
            file.truncate(image_->nbytes());  // takes the padding of the last direct write off
            file.sync();
            direct = file.direct();
            file.close();
        }
    } catch (...) {
        fail(std::current_exception());
    }
    {
        std::lock_guard lock(file_mutex_);
        file_.reset();
        closed_ = true;
    }
    std::lock_guard lock(mutex_);
    write_s_ = seconds_since(began_);
    direct_held_ = direct;
    written_ = true;
    changed_.notify_all();
}

void Transfer::fail(std::exception_ptr error) {
    std::lock_guard lock(mutex_);
    if (written_) return;
    if (!error_) error_ = error;
    stopped_ = true;
    note_progress();
    finish_if_through();
    mover_.arena_->nudge();
}

bool Transfer::all_copied() const { return copies_left_ == 0 && (leased_ == nblocks_ || stopped_); }

bool Transfer::may_return() const { return overlapped_ ? urgent_left_ == 0 : all_copied(); }

void Transfer::note_progress() {
    if (save_s_ < 0 && may_return()) save_s_ = seconds_since(began_);
    if (copy_s_ < 0 && all_copied()) copy_s_ = seconds_since(began_);
    if (may_return()) changed_.notify_all();
}

void Transfer::finish_if_through() {
    if (finishing_ || through_ != leased_ || (leased_ != nblocks_ && !stopped_)) return;
    finishing_ = true;
    mover_.io_.submit([self = shared_from_this()] { self->finish(); });
}

bool Transfer::advance(Clock::time_point deadline) {
    for (;;) {
        uint64_t missing;
        {
            std::lock_guard lock(mutex_);
            if (may_return()) return true;
            missing = stopped_ ? 0 : nblocks_ - leased_;
        }
        if (missing > 0) {
            std::vector<uint8_t*> slots;
            mover_.arena_->lease_free(missing, slots);
            if (!slots.empty()) add_blocks(slots);
            missing -= slots.size();
        }
        if (mover_.copier_.help(this, true)) {
            if (Clock::now() >= deadline) return false;
            continue;
        }
        if (missing > 0) {
            mover_.arena_->wait_free(std::min(deadline, Clock::now() + std::chrono::milliseconds(50)));
        } else {
            std::unique_lock lock(mutex_);
            changed_.wait_until(lock, deadline, [this] { return may_return(); });
        }
        if (Clock::now() >= deadline) {
            std::lock_guard lock(mutex_);
            return may_return();
        }
    }
}

bool Transfer::wait_copied(Clock::time_point deadline) {
    while (mover_.copier_.help(this, false)) {
        if (Clock::now() >= deadline) return copied();
    }
    std::unique_lock lock(mutex_);
    return changed_.wait_until(lock, deadline, [this] { return all_copied(); });
}

bool Transfer::wait_written(Clock::time_point deadline) {
    std::unique_lock lock(mutex_);
    if (!changed_.wait_until(lock, deadline, [this] { return written_; })) return false;
    if (error_) std::rethrow_exception(error_);
    return true;
}

void Transfer::abandon() {
    fail(std::make_exception_ptr(FileError(ECANCELED, "the transfer was abandoned", path_)));
    wait_copied(Clock::time_point::max());
}

bool Transfer::copied() const {
    std::lock_guard lock(mutex_);
    return all_copied();
}

bool Transfer::written() const {
    std::lock_guard lock(mutex_);
    return written_ && !error_;
}

Digest Transfer::digest() const {
    std::lock_guard lock(mutex_);
    return {image_->nbytes(), block_bytes_, crcs_};
}

TransferStats Transfer::stats() const {
    std::lock_guard lock(mutex_);
    return {image_->nbytes(), image_->eager_bytes(), image_->lazy_bytes(), save_s_, copy_s_,
            write_s_,         direct_held_};
}

Mover::Mover(std::shared_ptr<Arena> arena, int copy_threads, int io_threads, bool direct)
    : arena_(std::move(arena)),
      direct_(direct),
      io_(io_threads, "roll-io", kBackgroundNice),
      digests_(std::max(2, copy_threads), "roll-digest", kBackgroundNice),
      copier_(copy_threads) {}

Mover::~Mover() { shutdown(Clock::time_point::min()); }

std::shared_ptr<Transfer> Mover::begin(std::string path, std::shared_ptr<const Image> image, bool overlap,
                                       Check check) {
    auto transfer = std::make_shared<Transfer>(*this, std::move(path), std::move(image));
    {
        std::lock_guard lock(mutex_);
        if (closed_)
            throw std::runtime_error("this Mover was shut down: make a new one to save " + transfer->path());
        std::erase_if(transfers_, [](const auto& other) { return other.expired(); });
        transfers_.push_back(transfer);
    }
    transfer->start(overlap, check);
    return transfer;
}

bool Mover::shutdown(Clock::time_point deadline) {
    std::vector<std::shared_ptr<Transfer>> running;
    {
        std::lock_guard lock(mutex_);
        closed_ = true;
        for (const auto& weak : transfers_) {
            if (auto transfer = weak.lock()) running.push_back(std::move(transfer));
        }
    }
    for (const auto& transfer : running) {
        std::unique_lock lock(transfer->mutex_);
        transfer->changed_.wait_until(lock, deadline, [&] { return transfer->written_; });
    }
    for (const auto& transfer : running) {
        transfer->fail(std::make_exception_ptr(FileError(
            ECANCELED, "the transfer was stopped by a shutdown before it was durable", transfer->path_)));
    }
    const auto last = Clock::now() + kGrace;
    for (const auto& transfer : running) {
        if (!transfer->wait_copied(last)) return false;
        std::unique_lock lock(transfer->mutex_);
        if (!transfer->changed_.wait_until(lock, last, [&] { return transfer->written_; })) return false;
    }
    return copier_.finish(last) && digests_.finish(last) && io_.finish(last);
}

}  // namespace roll
