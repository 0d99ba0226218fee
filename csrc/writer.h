// The corridor of one file: lease a slot -> copy -> digest -> write -> give the slot back.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "arena.h"
#include "copier.h"
#include "file.h"
#include "image.h"
#include "watch.h"

namespace roll {

class Mover;

struct TransferStats {
    uint64_t nbytes, eager_bytes, lazy_bytes;
    double save_s;   // until save() may return
    double copy_s;   // until the last byte was copied
    double write_s;  // until the file was durable
    bool direct;     // whether direct I/O held to the end
};

// One file on its way to disk. Any thread may call; the first failure is kept and ends the transfer, and a
// failed write is never tried again. What was written so far stays on disk: the caller owns the path.
class Transfer : public CopyJob, public std::enable_shared_from_this<Transfer> {
  public:
    // Each of these works or waits until `deadline` and says whether its condition holds: save() may return;
    // no source byte will be read any more; the file is durable or has failed (wait_written rethrows why).
    bool advance(Clock::time_point deadline);
    bool wait_copied(Clock::time_point deadline);
    bool wait_written(Clock::time_point deadline);
    // Stops early. On return no source byte is read any more; slots come back as running writes end.
    void abandon();

    bool overlapped() const { return overlapped_; }
    bool copied() const;
    bool written() const;
    Digest digest() const;  // after wait_written
    TransferStats stats() const;
    const std::string& path() const { return path_; }

    Transfer(Mover& mover, std::string path, std::shared_ptr<const Image> image);
    ~Transfer() override;
    void copy(const Chunk& chunk) noexcept override;

  private:
    friend class Mover;
    struct Block {
        uint8_t* slot = nullptr;
        uint32_t copies_left = 0;
        bool scanned = false;
    };
    struct DeviceCopy {
        uint64_t block;
        Pass pass;
        int device;
        bool urgent;
    };

    void start(bool overlap, Check check);
    void add_blocks(const std::vector<uint8_t*>& slots);
    void list_copies(uint64_t block, Pass pass, bool urgent, std::vector<Chunk>& chunks,
                     std::vector<DeviceCopy>& device_copies) const;
    void copy_from_device(const DeviceCopy& copy, void* stream, const std::string& error) noexcept;
    void copy_ended(uint64_t block, bool urgent);
    void scan(uint64_t block) noexcept;
    void write(uint64_t block) noexcept;
    void finish() noexcept;
    void fail(std::exception_ptr error);
    void open_early();
    void open();
    File& opened();

    uint64_t start_of(uint64_t block) const { return block * block_bytes_; }
    uint64_t end_of(uint64_t block) const {
        return std::min(start_of(block) + block_bytes_, image_->nbytes());
    }
    // With mutex_ held:
    bool may_return() const;
    bool all_copied() const;
    void finish_if_through();
    void note_progress();

    Mover& mover_;
    const std::string path_;
    const std::shared_ptr<const Image> image_;
    const uint64_t block_bytes_, nblocks_;
    const Clock::time_point began_ = Clock::now();
    bool overlapped_ = false;
    std::map<int, void*> events_;  // per device: behind all the caller had queued when save() began
    Sealer sealer_;
    Watch watch_;

    std::mutex file_mutex_;
    std::unique_ptr<File> file_;
    std::exception_ptr open_error_;
    bool closed_ = false;

    mutable std::mutex mutex_;
    std::condition_variable changed_;
    std::atomic<bool> stopped_{false};
    std::exception_ptr error_;
    std::vector<Block> blocks_;
    std::vector<uint32_t> crcs_;
    uint64_t leased_ = 0, through_ = 0, next_to_seal_ = 0;  // blocks that got a slot; that gave it back
    uint64_t copies_left_ = 0, urgent_left_ = 0;
    bool sealing_ = false, finishing_ = false, written_ = false, direct_held_ = false;
    double save_s_ = -1, copy_s_ = -1, write_s_ = -1;
};

// The threads that carry transfers. Make it once for an arena; any thread may save. Several transfers share
// the arena without deadlock: slots go to a file's blocks in order, and a block that has one needs nothing
// else.
class Mover {
  public:
    Mover(std::shared_ptr<Arena> arena, int copy_threads, int io_threads, bool direct);
    ~Mover();

    // Begins a transfer and returns at once; the caller then drives advance() until it is true. Sources of
    // lazy extents must stay as they are until wait_copied, all others until advance() is true. What `check`
    // finds changed by then fails the transfer with SourceChanged.
    std::shared_ptr<Transfer> begin(std::string path, std::shared_ptr<const Image> image, bool overlap,
                                    Check check);
    // Lets running transfers end until the deadline, then stops them. True: all threads have ended. False:
    // some hang in the operating system, and this object must never be destroyed.
    bool shutdown(Clock::time_point deadline);
    bool closed() const { return closed_; }

  private:
    friend class Transfer;
    std::shared_ptr<Arena> arena_;
    const bool direct_;
    std::atomic<bool> closed_{false};
    std::mutex mutex_;
    std::vector<std::weak_ptr<Transfer>> transfers_;
    ThreadPool io_, digests_;
    Copier copier_;  // last: its threads end first, they feed the others
};

}  // namespace roll
