// The path of one file to disk, block by block: take a slot of the arena, copy, digest, write, return the
// slot. Borrowed extents are on the host already. A block that lies in one of them, aligned for direct I/O,
// is digested and written from its source; other blocks that hold nothing but borrowed bytes go through a
// small window of slots after save() has returned.
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
#include "source_check.h"

namespace roll {

class Mover;

struct TransferStats {
    uint64_t nbytes, eager_bytes, lazy_bytes;
    uint64_t borrowed_bytes;   // part of lazy_bytes
    uint64_t zero_copy_bytes;  // written from their source, never copied
    double save_s;             // seconds until save() may return
    double copy_s;             // seconds until the last byte that is not borrowed was copied
    double write_s;            // seconds until the file was durable
    bool direct;               // whether direct I/O was used to the end
};

// One file on its way to disk. Any thread may call any method. The first failure is kept and ends the
// transfer; a failed write is never tried again. What was written so far stays on disk: the caller owns the
// path.
class Transfer : public CopyJob, public std::enable_shared_from_this<Transfer> {
  public:
    // Each of these works or waits until `deadline` and says whether its condition holds.
    bool advance(Clock::time_point deadline);  // save() may return
    // No source will be read any more, except borrowed ones. With `help` the caller copies too.
    bool wait_copied(Clock::time_point deadline, bool help = true);
    bool wait_released(Clock::time_point deadline);  // no source will be read any more
    bool wait_written(Clock::time_point deadline);  // the file is durable; rethrows a failure of the transfer
    // Stops early. On return no source byte is read any more; slots are returned as running writes end.
    void abandon();

    bool overlapped() const { return overlapped_; }
    bool copied() const;
    bool released() const;
    bool written() const;
    Digest digest() const;  // after wait_written
    TransferStats stats() const;
    const std::string& path() const { return path_; }

    Transfer(Mover& mover, std::string path, std::shared_ptr<const Image> image);
    ~Transfer() override;
    void copy(const Chunk& chunk) noexcept override;

  private:
    friend class Mover;
    enum Route : uint8_t {
        kStaged,    // holds bytes that are not borrowed: takes its slot before save() returns, if all fit
        kStreamed,  // borrowed bytes and gaps only: takes a slot of the window
        kZeroCopy,  // one borrowed extent, aligned: written from its source
    };
    struct Block {
        const uint8_t* data = nullptr;  // the slot, or the source of a kZeroCopy block
        uint8_t* slot = nullptr;
        uint32_t copies_left = 0;
        Route route = kStaged;
        bool begun = false, scanned = false;
    };
    struct DeviceCopy {
        uint64_t block;
        Pass pass;
        int device;
        bool urgent;
    };
    // What the threads are to do next for blocks that have begun.
    struct Work {
        std::vector<Chunk> chunks;
        std::vector<DeviceCopy> device_copies;
        std::vector<uint64_t> zero_copy;
    };
    // Late copies from one device whose samples are fetched before, all at once.
    using Group = std::vector<DeviceCopy>;

    void start(bool overlap, Check check);
    Route route_of(uint64_t block) const;
    void begin_blocks(const std::vector<uint8_t*>& slots);
    void begin_block(uint64_t block, Work& work);
    void list_copies(uint64_t block, Pass pass, bool urgent, std::vector<Chunk>& chunks,
                     std::vector<DeviceCopy>& device_copies) const;
    std::vector<Group> groups_to_sample(std::vector<DeviceCopy>& copies) const;
    void submit_device_copies(std::vector<DeviceCopy> copies);
    void sample_device(const Group& group, void* stream, const std::string& error) noexcept;
    void copy_from_device(const DeviceCopy& copy, void* stream, const std::string& error) noexcept;
    // Fetches `regions(copy)` of each copy, and waits for them; "" or what failed.
    template <class Regions>
    std::string fetch(const Group& group, void* stream, Regions regions) noexcept;
    void fail_device(int device, const std::string& failure);
    void copy_ended(uint64_t block, bool urgent);
    void scan(uint64_t block) noexcept;
    void check_unchanged(uint64_t block) const;  // throws SourceChanged
    void patch_scanned() noexcept;
    void write(uint64_t block) noexcept;
    void finish() noexcept;
    void fail(std::exception_ptr error);
    void open_early();
    void open();
    File& opened_file();

    uint64_t start_of(uint64_t block) const { return block * block_bytes_; }
    uint64_t end_of(uint64_t block) const {
        return std::min(start_of(block) + block_bytes_, image_->nbytes());
    }
    // With mutex_ held:
    bool may_return() const;
    bool all_copied() const;
    bool all_released() const;
    uint64_t missing_slots() const;
    void finish_if_all_ended();
    void note_progress();

    Mover& mover_;
    const std::string path_;
    const std::shared_ptr<const Image> image_;
    const uint64_t block_bytes_, nblocks_;
    const uint64_t window_;  // slots for kStreamed blocks: an eighth of the arena, so that several saves fit
    const Clock::time_point began_ = Clock::now();
    bool overlapped_ = false;
    std::map<int, void*> events_;  // per device: behind all work queued when save() began
    CrcPatcher crc_patcher_;
    SourceCheck source_check_;

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
    std::vector<uint8_t*> spare_slots_;      // slots without a block yet
    uint64_t next_ = 0, next_to_patch_ = 0;  // the first block not begun; the first not patched
    uint64_t begun_ = 0, ended_ = 0;         // blocks that have begun; of those, the ones written or given up
    uint64_t required_end_ = 0;              // save() waits until every block before this one has its slot,
    uint64_t required_slots_ = 0;            // which so many of them do not have yet
    uint64_t staged_left_ = 0;               // kStaged blocks not begun
    uint64_t slotless_ = 0;                  // blocks not begun that need a slot
    uint64_t deferred_ = 0;                  // blocks on their way that are not kStaged
    uint64_t window_slots_ = 0;              // slots that kStreamed blocks hold
    uint64_t copies_left_ = 0;               // running or queued copies of kStaged blocks
    uint64_t urgent_left_ = 0;               // those of them that save() waits for
    uint64_t zero_copy_bytes_ = 0;
    bool has_unstaged_ = false;  // some block is not kStaged
    bool patching_ = false, finishing_ = false, written_ = false, direct_held_ = false;
    double save_s_ = -1, copy_s_ = -1, write_s_ = -1;
};

// The threads that carry transfers. Create one for an arena; any thread may save. Several transfers share the
// arena without deadlock: a file takes slots for its blocks in order, or at once for all blocks with bytes
// that are not borrowed and at least one more for the rest; a block that has a slot needs nothing else.
class Mover {
  public:
    Mover(std::shared_ptr<Arena> arena, int copy_threads, int io_threads, bool direct);
    ~Mover();

    // Begins a transfer and returns at once; the caller then calls advance() until it returns true. Sources
    // must not change: lazy ones until wait_copied, borrowed ones until wait_released, all others until
    // advance() has returned true. If `check` finds a changed source, the transfer fails with SourceChanged.
    std::shared_ptr<Transfer> begin(std::string path, std::shared_ptr<const Image> image, bool overlap,
                                    Check check);
    // Lets running transfers end until the deadline, then stops them. False if a thread hangs in the
    // operating system: then this object must never be destroyed. True if all threads have ended.
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
