// The staging memory: one anonymous mapping, cut into equal slots, never more than its capacity.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "thread_pool.h"

namespace roll {

// Anonymous, zeroed memory with huge pages advised; unmapped with the object.
class Mapping {
  public:
    explicit Mapping(uint64_t nbytes);  // throws std::bad_alloc-like FileError (ENOMEM)
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;
    uint8_t* data() const { return data_; }
    uint64_t mapped_bytes() const { return mapped_; }

  private:
    uint8_t* data_;
    uint64_t mapped_;
};

// A pool of slots of block_bytes each. Any thread may call anything. Slots are handed out last in, first out,
// so that pages that were touched are used again. The mapping is not passed on to forked children.
class Arena {
  public:
    Arena(uint64_t capacity_bytes, uint64_t block_bytes);
    ~Arena();

    uint64_t block_bytes() const { return block_bytes_; }
    uint64_t capacity_bytes() const { return capacity_; }
    uint64_t leased_bytes() const;
    uint64_t peak_bytes() const;

    bool try_lease(uint64_t count, std::vector<uint8_t*>& slots);  // all of them at once, or none
    void lease_free(uint64_t most, std::vector<uint8_t*>& slots);  // what is free, perhaps nothing
    bool wait_free(Clock::time_point deadline);                    // until a slot may be free
    void give_back(uint8_t* slot);
    void nudge();  // wakes wait_free

    // Faults the first nbytes in on a background thread, and with device >= 0 pins them for CUDA there.
    void warm(uint64_t nbytes, int device);
    void wait_warm();
    // Native threads: pins the memory up to the end of this slot where that is not done yet, and says whether
    // the slot is pinned now. Failure is no error: nothing more is pinned then, and pinned_reason() says why.
    bool pin(int device, const uint8_t* slot);
    bool pinned() const { return pinned_bytes_ > 0; }
    std::string pinned_reason() const;

  private:
    bool pin_first(int device, uint64_t nbytes);
    // What is pinned at once: whole slots, since no copy may leave the memory of one registration.
    uint64_t pin_step() const;

    uint64_t block_bytes_, capacity_;
    Mapping mapping_;
    mutable std::mutex mutex_;
    std::condition_variable freed_;
    std::vector<uint8_t*> free_;
    uint64_t leased_ = 0, peak_ = 0;

    std::mutex warm_mutex_;
    std::thread warmer_;
    std::atomic<bool> stop_{false};
    mutable std::mutex pin_mutex_;
    std::atomic<uint64_t> pinned_bytes_{0};  // from the start of the mapping
    bool pin_failed_ = false;
    int pin_device_ = -1;
    std::string pinned_reason_ = "not asked for";
};

}  // namespace roll
