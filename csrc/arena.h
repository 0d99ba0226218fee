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
    explicit Mapping(uint64_t nbytes);  // throws std::bad_alloc
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;
    uint8_t* data() const { return data_; }
    uint64_t mapped_bytes() const { return mapped_; }

  private:
    uint8_t* data_;
    uint64_t mapped_;
};

// A pool of slots of block_bytes each. Any thread may call any method. The slot returned last is taken first,
// because its pages are already faulted in. Forked children do not inherit the mapping.
class Arena {
  public:
    Arena(uint64_t capacity_bytes, uint64_t block_bytes);
    ~Arena();

    uint64_t block_bytes() const { return block_bytes_; }
    uint64_t capacity_bytes() const { return capacity_; }
    uint64_t used_bytes() const;  // of slots in use
    uint64_t peak_bytes() const;  // the most that were in use at once

    // Both append the slots they take to `slots` and never wait.
    bool try_take_slots(uint64_t count, std::vector<uint8_t*>& slots);  // all `count` of them, or none
    void take_free_slots(uint64_t most, std::vector<uint8_t*>& slots);  // as many as are free, perhaps none
    // Waits until a slot is free, wake_waiters() is called or the deadline has passed; says whether one is
    // free.
    bool wait_free(Clock::time_point deadline);
    void return_slot(uint8_t* slot);
    void wake_waiters();  // ends every wait_free

    // Faults in the first nbytes on a background thread; with device >= 0, also pins them for CUDA on that
    // device.
    void warm(uint64_t nbytes, int device);
    void wait_warm();  // until the background thread has ended
    // Native threads only: pins all memory up to the end of this slot, as far as it is not pinned yet, and
    // says whether the slot is pinned now. A failure is not an error: nothing more is pinned from then on,
    // and pinned_reason() says why.
    bool pin(int device, const uint8_t* slot);
    bool pinned() const { return pinned_bytes_ > 0; }
    std::string pinned_reason() const;

  private:
    bool pin_first(int device, uint64_t nbytes);
    // How many bytes are pinned at once: whole slots, because a copy must stay within one CUDA registration.
    uint64_t pin_step() const;

    uint64_t block_bytes_, capacity_;
    Mapping mapping_;
    mutable std::mutex mutex_;
    std::condition_variable freed_;
    std::vector<uint8_t*> free_;
    uint64_t used_ = 0, peak_ = 0;

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
