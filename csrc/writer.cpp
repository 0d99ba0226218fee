#include "writer.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace roll {
namespace {

constexpr int kBackgroundNice = 10;
constexpr uint64_t kDeferredBlocks = 8;           // of one file on their way at once
constexpr size_t kGroup = 64;                     // blocks whose samples are fetched from a device at once
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
      window_(std::clamp<uint64_t>(mover_.arena_->capacity_bytes() / block_bytes_ / 8, 1, kDeferredBlocks)),
      crc_patcher_(*image_, block_bytes_),
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
    // The file is opened in the background, first of all, so that a full disk shows before the copies are
    // made.
    mover_.io_.submit([self] {
        try {
            self->open_early();
        } catch (...) {
            self->fail(std::current_exception());
        }
    });
    std::vector<uint8_t*> slots;
    {
        std::lock_guard lock(mutex_);
        uint64_t streamed = 0;
        for (uint64_t block = 0; block < nblocks_; ++block) {
            Route route = overlap && image_->borrowed_bytes() > 0 ? route_of(block) : kStaged;
            blocks_[block].route = route;
            if (route == kStaged) {
                ++staged_left_;
                required_end_ = block + 1;
            } else {
                has_unstaged_ = true;
            }
            if (route == kStreamed) ++streamed;
            if (route == kZeroCopy) zero_copy_bytes_ += end_of(block) - start_of(block);
        }
        slotless_ = staged_left_ + streamed;
        if (overlap && image_->lazy_bytes() > 0) {
            overlapped_ = mover_.arena_->try_take_slots(staged_left_ + std::min(window_, streamed), slots);
        }
        if (overlapped_) required_end_ = 0;
        for (uint64_t block = 0; block < required_end_; ++block)
            required_slots_ += blocks_[block].route != kZeroCopy;
    }
    // Digest the sources before any copy, while the caller is still in save().
    // What is on a device is copied before save() returns, unless all of the file fitted.
    if (overlapped_ || has_unstaged_) source_check_ = SourceCheck(*image_, block_bytes_, check, overlapped_);
    begin_blocks(slots);
}

Transfer::Route Transfer::route_of(uint64_t block) const {
    const uint64_t from = start_of(block), to = end_of(block);
    auto ends_by = [from](const auto& range) { return range.end() <= from; };
    const auto& extents = image_->extents();
    const auto& patches = image_->patches();
    auto extent = std::partition_point(extents.begin(), extents.end(), ends_by);
    auto patch = std::partition_point(patches.begin(), patches.end(), ends_by);
    // A block with a patch cannot be written from its source: the patch would have to be written into that.
    if ((to - from) % kPage == 0 && (patch == patches.end() || patch->offset >= to) &&
        extent != extents.end() && extent->borrowed && extent->offset <= from && extent->end() >= to &&
        (extent->address + from - extent->offset) % kPage == 0) {
        return kZeroCopy;
    }
    for (; extent != extents.end() && extent->offset < to; ++extent) {
        if (!extent->borrowed) return kStaged;
    }
    return kStreamed;
}

// Adds `slots` to the spare ones, begins the blocks that can begin, and returns slots that are no longer
// needed.
void Transfer::begin_blocks(const std::vector<uint8_t*>& slots) {
    Work work;
    std::vector<Group> groups;
    {
        std::lock_guard lock(mutex_);
        spare_slots_.insert(spare_slots_.end(), slots.begin(), slots.end());
        // No block may begin after a stop: the threads may already be ending.
        for (uint64_t block = 0; overlapped_ && staged_left_ > 0 && !stopped_; ++block) {
            if (blocks_[block].route == kStaged) begin_block(block, work);
        }
        for (; next_ < nblocks_ && !stopped_; ++next_) {
            const Block& block = blocks_[next_];
            if (block.begun) continue;
            if (block.route != kStaged && next_ >= required_end_ && deferred_ >= kDeferredBlocks) break;
            if (block.route != kZeroCopy && spare_slots_.empty()) break;
            begin_block(next_, work);
        }
        const uint64_t room = window_ - std::min(window_, window_slots_);
        const uint64_t keep = stopped_ ? 0 : std::min(slotless_, room);
        for (; spare_slots_.size() > keep; spare_slots_.pop_back())
            mover_.arena_->return_slot(spare_slots_.back());
        groups = groups_to_sample(work.device_copies);
        urgent_left_ += groups.size();
        note_progress();
        finish_if_all_ended();
    }
    auto self = shared_from_this();
    submit_device_copies(std::move(work.device_copies));
    for (Group& group : groups) {
        const int device = group.front().device;
        mover_.copier_.submit_device(
            device, true, [self, group = std::move(group)](void* stream, const std::string& error) {
                self->sample_device(group, stream, error);
            });
    }
    mover_.copier_.submit(self, work.chunks);
    for (uint64_t block : work.zero_copy) {
        mover_.digests_.submit([self, block] { self->scan(block); });
    }
}

// With mutex_ held: begins one block, which takes a spare slot if it needs one.
void Transfer::begin_block(uint64_t index, Work& work) {
    Block& block = blocks_[index];
    block.begun = true;
    ++begun_;
    if (block.route != kStaged) ++deferred_;
    if (block.route == kZeroCopy) {
        auto extent = std::partition_point(image_->extents().begin(), image_->extents().end(),
                                           [&](const Extent& e) { return e.end() <= start_of(index); });
        block.data = reinterpret_cast<const uint8_t*>(extent->address) + (start_of(index) - extent->offset);
        work.zero_copy.push_back(index);
        return;
    }
    block.data = block.slot = spare_slots_.back();
    spare_slots_.pop_back();
    --slotless_;
    if (index < required_end_) --required_slots_;
    const size_t before = work.chunks.size() + work.device_copies.size();
    auto listed = [&] { return work.chunks.size() + work.device_copies.size() - before; };
    if (block.route == kStreamed) {
        ++window_slots_;
        list_copies(index, kLazy, false, work.chunks, work.device_copies);
    } else if (overlapped_) {
        list_copies(index, kEager, true, work.chunks, work.device_copies);
        urgent_left_ += listed();
        list_copies(index, kLazy, false, work.chunks, work.device_copies);
    } else {
        list_copies(index, kEverything, true, work.chunks, work.device_copies);
        urgent_left_ += listed();
    }
    block.copies_left = static_cast<uint32_t>(listed());
    if (block.route == kStaged) {
        --staged_left_;
        copies_left_ += block.copies_left;
    }
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

// Takes the late copies that have something to sample out of `copies`, in groups of one device each.
std::vector<Transfer::Group> Transfer::groups_to_sample(std::vector<DeviceCopy>& copies) const {
    std::vector<Group> groups;
    std::erase_if(copies, [&](const DeviceCopy& copy) {
        if (copy.urgent ||
            source_check_.regions(start_of(copy.block), end_of(copy.block), copy.device, nullptr).empty()) {
            return false;
        }
        if (groups.empty() || groups.back().size() == kGroup || groups.back().front().device != copy.device)
            groups.emplace_back();
        groups.back().push_back(copy);
        return true;
    });
    return groups;
}

void Transfer::submit_device_copies(std::vector<DeviceCopy> copies) {
    auto self = shared_from_this();
    for (const DeviceCopy& copy : copies) {
        mover_.copier_.submit_device(copy.device, copy.urgent,
                                     [self, copy](void* stream, const std::string& error) {
                                         self->copy_from_device(copy, stream, error);
                                     });
    }
}

// The samples of a block are fetched to where its copy will lie, digested there, and overwritten by the copy.
void Transfer::sample_device(const Group& group, void* stream, const std::string& error) noexcept {
    const int device = group.front().device;
    std::string failure = error;
    if (!stopped_ && stream) {
        failure = fetch(group, stream, [this](const DeviceCopy& copy) {
            return source_check_.regions(start_of(copy.block), end_of(copy.block), copy.device,
                                         blocks_[copy.block].slot);
        });
        for (const DeviceCopy& copy : group) {
            source_check_.digest(start_of(copy.block), end_of(copy.block), device, blocks_[copy.block].slot);
        }
    }
    if (!failure.empty()) fail_device(device, failure);
    submit_device_copies(group);
    std::lock_guard lock(mutex_);
    --urgent_left_;
    note_progress();
}

void Transfer::copy_from_device(const DeviceCopy& copy, void* stream, const std::string& error) noexcept {
    std::string failure = error;
    if (!stopped_ && stream) {
        failure = fetch({copy}, stream, [this](const DeviceCopy& one) {
            return device_regions(*image_, start_of(one.block), end_of(one.block), one.pass, one.device,
                                  blocks_[one.block].slot);
        });
    }
    if (!failure.empty()) fail_device(copy.device, failure);
    copy_ended(copy.block, copy.urgent);
}

template <class Regions>
std::string Transfer::fetch(const Group& group, void* stream, Regions regions) noexcept {
    const cuda::Table& cuda = cuda::table();
    std::string failure;
    try {
        cuda.follow(stream, events_.at(group.front().device));
        for (const DeviceCopy& copy : group) {
            const bool pinned = mover_.arena_->pin(copy.device, blocks_[copy.block].slot);
            const std::vector<cuda::Region> wanted = regions(copy);
            cuda.copy(stream, wanted.data(), wanted.size(), pinned);
        }
    } catch (const std::exception& thrown) {
        failure = thrown.what();
    }
    // All queued copies must have ended before the slot or the source may be used for anything else.
    try {
        cuda.finish(stream);
    } catch (const std::exception& thrown) {
        if (failure.empty()) failure = thrown.what();
    }
    return failure;
}

void Transfer::fail_device(int device, const std::string& failure) {
    fail(std::make_exception_ptr(
        FileError(EIO, "copying from CUDA device " + std::to_string(device) + ": " + failure, path_)));
}

void Transfer::copy_ended(uint64_t block, bool urgent) {
    bool block_is_full;
    {
        std::lock_guard lock(mutex_);
        if (blocks_[block].route == kStaged) --copies_left_;
        if (urgent) --urgent_left_;
        block_is_full = --blocks_[block].copies_left == 0;
        note_progress();
    }
    if (block_is_full) mover_.digests_.submit([self = shared_from_this(), block] { self->scan(block); });
}

// Digests one block, then patches the blocks whose turn has come, unless another thread is doing so.
void Transfer::scan(uint64_t block) noexcept {
    try {
        if (!stopped_) {
            crc_patcher_.scan(block, blocks_[block].data);
            check_unchanged(block);
        }
    } catch (...) {
        fail(std::current_exception());
    }
    {
        std::lock_guard lock(mutex_);
        blocks_[block].scanned = true;
    }
    patch_scanned();
}

void Transfer::check_unchanged(uint64_t block) const {
    if (auto piece = source_check_.changed(start_of(block), end_of(block), blocks_[block].data)) {
        throw SourceChanged(path_, piece->start, piece->end);
    }
}

void Transfer::patch_scanned() noexcept {
    std::unique_lock lock(mutex_);
    if (patching_) return;
    patching_ = true;
    while (next_to_patch_ < nblocks_) {
        const uint64_t next = next_to_patch_;
        if (stopped_ && !blocks_[next].begun) {  // it never will begin; blocks behind it may have
            ++next_to_patch_;
            continue;
        }
        if (!blocks_[next].scanned) break;
        lock.unlock();
        uint32_t crc = 0;
        try {
            if (!stopped_) crc = crc_patcher_.patch(next, blocks_[next].slot);
        } catch (...) {
            fail(std::current_exception());
        }
        lock.lock();
        crcs_[next] = crc;  // before the write: once the last block is written the digest is read
        ++next_to_patch_;
        lock.unlock();
        mover_.io_.submit([self = shared_from_this(), next] { self->write(next); });
        lock.lock();
    }
    patching_ = false;
}

void Transfer::write(uint64_t block) noexcept {
    const Block& written = blocks_[block];
    try {
        if (!stopped_) {
            File& file = opened_file();
            const uint64_t nbytes = end_of(block) - start_of(block);
            const uint64_t padded = file.direct() ? round_up(nbytes, kPage) : nbytes;
            if (padded > nbytes)
                std::memset(written.slot + nbytes, 0, padded - nbytes);  // a kZeroCopy block is never padded
            file.write_at(written.data, padded, start_of(block));
            if (written.route == kZeroCopy) check_unchanged(block);  // the write read its source again
        }
    } catch (...) {
        fail(std::current_exception());
    }
    {
        std::lock_guard lock(mutex_);
        if (written.slot && staged_left_ > 0) {
            mover_.arena_->return_slot(written.slot);  // save() waits for it there
        } else if (written.slot) {
            spare_slots_.push_back(written.slot);
        }
        if (written.route == kStreamed) --window_slots_;
        if (written.route != kStaged) --deferred_;
        ++ended_;
    }
    begin_blocks({});
}

// This may run only after the other threads have written and closed the file: opening it again would truncate
// it.
void Transfer::open_early() {
    std::lock_guard lock(file_mutex_);
    if (!closed_ && !stopped_) open();
}

File& Transfer::opened_file() {
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
            File& file = opened_file();
            file.truncate(image_->nbytes());  // cuts off the padding of the last direct write
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
    {
        std::lock_guard lock(mutex_);
        if (written_) return;
        if (!error_) error_ = error;
        stopped_ = true;
        note_progress();
        finish_if_all_ended();
        mover_.arena_->wake_waiters();
    }
    patch_scanned();
}

bool Transfer::all_copied() const { return copies_left_ == 0 && (staged_left_ == 0 || stopped_); }

bool Transfer::all_released() const { return all_copied() && (!has_unstaged_ || finishing_); }

// Slots that save() has to wait for: those of all required blocks if the file did not fit into the arena at
// once, then one with which the rest can go on in the background.
uint64_t Transfer::missing_slots() const {
    if (stopped_) return 0;
    if (staged_left_ > 0) return required_slots_ - std::min<uint64_t>(required_slots_, spare_slots_.size());
    return spare_slots_.empty() && window_slots_ == 0 ? std::min(window_, slotless_) : 0;
}

bool Transfer::may_return() const {
    return (overlapped_ ? urgent_left_ == 0 : all_copied()) && missing_slots() == 0;
}

void Transfer::note_progress() {
    if (save_s_ < 0 && may_return()) save_s_ = seconds_since(began_);
    if (copy_s_ < 0 && all_copied()) copy_s_ = seconds_since(began_);
    if (may_return()) changed_.notify_all();
}

void Transfer::finish_if_all_ended() {
    if (finishing_ || ended_ != begun_ || (begun_ != nblocks_ && !stopped_)) return;
    finishing_ = true;
    for (; !spare_slots_.empty(); spare_slots_.pop_back()) mover_.arena_->return_slot(spare_slots_.back());
    changed_.notify_all();  // borrowed sources are released
    mover_.io_.submit([self = shared_from_this()] { self->finish(); });
}

bool Transfer::advance(Clock::time_point deadline) {
    for (;;) {
        uint64_t missing;
        {
            std::lock_guard lock(mutex_);
            if (may_return()) return true;
            missing = missing_slots();
        }
        if (missing > 0) {
            std::vector<uint8_t*> slots;
            mover_.arena_->take_free_slots(missing, slots);
            if (!slots.empty()) begin_blocks(slots);
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
            wait_until(changed_, lock, deadline, [this] { return may_return(); });
        }
        if (Clock::now() >= deadline) {
            std::lock_guard lock(mutex_);
            return may_return();
        }
    }
}

bool Transfer::wait_copied(Clock::time_point deadline, bool help) {
    while (help && !copied() &&
           mover_.copier_.help(this, false)) {  // once all is copied, borrowed bytes are left to the threads
        if (Clock::now() >= deadline) return copied();
    }
    std::unique_lock lock(mutex_);
    return wait_until(changed_, lock, deadline, [this] { return all_copied(); });
}

bool Transfer::wait_released(Clock::time_point deadline) {
    if (!wait_copied(deadline)) return false;
    std::unique_lock lock(mutex_);
    return wait_until(changed_, lock, deadline, [this] { return all_released(); });
}

bool Transfer::wait_written(Clock::time_point deadline) {
    std::unique_lock lock(mutex_);
    if (!wait_until(changed_, lock, deadline, [this] { return written_; })) return false;
    if (error_) std::rethrow_exception(error_);
    return true;
}

void Transfer::abandon() {
    fail(std::make_exception_ptr(FileError(ECANCELED, "the transfer was abandoned", path_)));
    wait_released(Clock::time_point::max());
}

bool Transfer::copied() const {
    std::lock_guard lock(mutex_);
    return all_copied();
}

bool Transfer::released() const {
    std::lock_guard lock(mutex_);
    return all_released();
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
    return {image_->nbytes(),
            image_->eager_bytes(),
            image_->lazy_bytes(),
            image_->borrowed_bytes(),
            zero_copy_bytes_,
            save_s_,
            copy_s_,
            write_s_,
            direct_held_};
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
            throw std::runtime_error("this Mover was shut down: create a new one to save " +
                                     transfer->path());
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
        wait_until(transfer->changed_, lock, deadline, [&] { return transfer->written_; });
    }
    for (const auto& transfer : running) {
        transfer->fail(std::make_exception_ptr(FileError(
            ECANCELED, "the transfer was stopped by a shutdown before it was durable", transfer->path_)));
    }
    const auto last = Clock::now() + kGrace;
    for (const auto& transfer : running) {
        if (!transfer->wait_copied(last)) return false;
        std::unique_lock lock(transfer->mutex_);
        if (!wait_until(transfer->changed_, lock, last, [&] { return transfer->written_; })) return false;
    }
    return copier_.finish(last) && digests_.finish(last) && io_.finish(last);
}

}  // namespace roll
