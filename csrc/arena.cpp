#include "arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <new>
#include <stdexcept>

#include "cuda_api.h"
#include "file.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace roll {
namespace {

constexpr uint64_t kHugePage = 2 << 20;
constexpr uint64_t kMinBlock = 64 << 10;
// Pinned in steps: pinning blocks other CUDA calls of the process and commits memory that may not be needed
// yet.
constexpr uint64_t kPinBytes = 64 << 20;

uint64_t checked_capacity(uint64_t capacity, uint64_t block) {
    if (block < kMinBlock || block % kPage != 0) {
        throw std::invalid_argument("block_bytes must be a multiple of 4096 and at least 65536, not " +
                                    std::to_string(block));
    }
    if (capacity / block < 2) {
        throw std::invalid_argument("an arena of " + std::to_string(capacity) +
                                    " bytes cannot hold two blocks of " + std::to_string(block) +
                                    " bytes: enlarge capacity_bytes or shrink block_bytes");
    }
    return capacity / block * block;
}

// Makes pages present without changing their contents; safe while other threads use them.
void fault_in(uint8_t* data, uint64_t nbytes) {
    if (madvise(data, nbytes, MADV_POPULATE_WRITE) == 0) return;
    for (uint64_t i = 0; i < nbytes; i += kPage) __atomic_fetch_or(data + i, uint8_t{0}, __ATOMIC_RELAXED);
}

}  // namespace

Mapping::Mapping(uint64_t nbytes) : mapped_(round_up(std::max<uint64_t>(nbytes, 1), kPage)) {
    if (nbytes >= kHugePage) mapped_ = round_up(nbytes, kHugePage);
    void* data =
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<uint8_t*>(data);
    madvise(data_, mapped_, MADV_HUGEPAGE);
}

Mapping::~Mapping() { munmap(data_, mapped_); }

Arena::Arena(uint64_t capacity_bytes, uint64_t block_bytes)
    : block_bytes_(block_bytes),
      capacity_(checked_capacity(capacity_bytes, block_bytes)),
      mapping_(capacity_) {
    madvise(mapping_.data(), mapping_.mapped_bytes(), MADV_DONTFORK);
    for (uint64_t offset = capacity_; offset > 0; offset -= block_bytes_) {
        free_.push_back(mapping_.data() + offset - block_bytes_);
    }
}

Arena::~Arena() {
    stop_ = true;
    wait_warm();
    for (uint64_t offset = 0; offset < pinned_bytes_; offset += pin_step()) {
        cuda::table().unpin(pin_device_, mapping_.data() + offset);
    }
}

uint64_t Arena::used_bytes() const {
    std::lock_guard lock(mutex_);
    return used_;
}

uint64_t Arena::peak_bytes() const {
    std::lock_guard lock(mutex_);
    return peak_;
}

bool Arena::try_take_slots(uint64_t count, std::vector<uint8_t*>& slots) {
    std::lock_guard lock(mutex_);
    if (free_.size() < count) return false;
    slots.insert(slots.end(), free_.rbegin(), free_.rbegin() + static_cast<ptrdiff_t>(count));
    free_.resize(free_.size() - count);
    used_ += count * block_bytes_;
    peak_ = std::max(peak_, used_);
    return true;
}

void Arena::take_free_slots(uint64_t most, std::vector<uint8_t*>& slots) {
    std::lock_guard lock(mutex_);
    uint64_t count = std::min<uint64_t>(most, free_.size());
    slots.insert(slots.end(), free_.rbegin(), free_.rbegin() + static_cast<ptrdiff_t>(count));
    free_.resize(free_.size() - count);
    used_ += count * block_bytes_;
    peak_ = std::max(peak_, used_);
}

bool Arena::wait_free(Clock::time_point deadline) {
    std::unique_lock lock(mutex_);
    if (free_.empty()) freed_.wait_until(lock, deadline);
    return !free_.empty();
}

void Arena::return_slot(uint8_t* slot) {
    {
        std::lock_guard lock(mutex_);
        free_.push_back(slot);
        used_ -= block_bytes_;
    }
    freed_.notify_all();
}

void Arena::wake_waiters() { freed_.notify_all(); }

void Arena::warm(uint64_t nbytes, int device) {
    std::lock_guard lock(warm_mutex_);
    if (warmer_.joinable()) warmer_.join();
    SignalsBlocked blocked;
    warmer_ = std::thread([this, nbytes = std::min(nbytes, capacity_), device] {
        name_this_thread("roll-warm");
        for (uint64_t done = 0; done < nbytes && !stop_;) {
            // One huge page per call: other threads that map or unmap memory wait for the call to return.
            uint64_t step = std::min(kHugePage, nbytes - done);
            fault_in(mapping_.data() + done, round_up(step, kPage));
            done += step;
            // Pin only pages that are already faulted in: pinning untouched pages is slower.
            if (device >= 0 && (done == nbytes || done >= pinned_bytes_ + pin_step()))
                pin_first(device, done);
        }
    });
}

void Arena::wait_warm() {
    std::lock_guard lock(warm_mutex_);
    if (warmer_.joinable()) warmer_.join();
}

uint64_t Arena::pin_step() const { return round_up(kPinBytes, block_bytes_); }

bool Arena::pin(int device, const uint8_t* slot) {
    return pin_first(device, static_cast<uint64_t>(slot - mapping_.data()) + block_bytes_);
}

bool Arena::pin_first(int device, uint64_t nbytes) {
    if (nbytes <= pinned_bytes_) return true;
    std::lock_guard lock(pin_mutex_);
    while (pinned_bytes_ < nbytes && !pin_failed_ && !stop_) {
        const uint64_t step = std::min(pin_step(), capacity_ - pinned_bytes_);
        try {
            cuda::table().use(device);
            cuda::table().pin(mapping_.data() + pinned_bytes_, step);
            pin_device_ = device;
            pinned_bytes_ += step;
            pinned_reason_.clear();
        } catch (const std::exception& error) {
            pin_failed_ = true;
            pinned_reason_ = error.what();
        }
    }
    return nbytes <= pinned_bytes_;
}

std::string Arena::pinned_reason() const {
    std::lock_guard lock(pin_mutex_);
    return pinned_reason_;
}

}  // namespace roll
