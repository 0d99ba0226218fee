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

    // Faults nbytes in on a background thread, and with device >= 0 pins the mapping for CUDA there.
    void warm(uint64_t nbytes, int device);
    void wait_warm();
    // Pins the mapping unless that was tried before; returns when it is known. Failure is no error: pinned()
    // stays false and pinned_reason() says why.
    void pin(int device);
    bool pinned() const;
    std::string pinned_reason() const;

  private:
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
    bool pin_tried_ = false, pinned_ = false;
    std::string pinned_reason_ = "not asked for";
};

}  // namespace roll
