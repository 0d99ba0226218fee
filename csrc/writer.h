// The corridor of one file: lease a slot -> copy -> digest -> write -> give the slot back. Leased extents are
// on the host already: a block that lies in one of them as it must for direct I/O is digested and written
// where it is, and the other blocks that hold nothing else go through a small window of slots, after save()
// returned.
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
    uint64_t leased_bytes, straight_bytes;  // of lazy_bytes; those that are never copied
    double save_s;                          // until save() may return
    double copy_s;                          // until the last byte was copied
    double write_s;                         // until the file was durable
    bool direct;                            // whether direct I/O held to the end
};

// One file on its way to disk. Any thread may call; the first failure is kept and ends the transfer, and a
// failed write is never tried again. What was written so far stays on disk: the caller owns the path.
class Transfer : public CopyJob, public std::enable_shared_from_this<Transfer> {
  public:
    // Each of these works or waits until `deadline` and says whether its condition holds: save() may return;
    // no source but leased ones will be read any more; no source at all; the file is durable or has failed
    // (wait_written rethrows why).
    bool advance(Clock::time_point deadline);
    bool wait_copied(Clock::time_point deadline);
    bool wait_released(Clock::time_point deadline);
    bool wait_written(Clock::time_point deadline);
    // Stops early. On return no source byte is read any more; slots come back as running writes end.
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
    enum Way : uint8_t {
        kNow,       // holds bytes that are not leased: gets its slot before save() returns, if all fit
        kWindow,    // leased bytes and gaps: takes a slot of the window
        kStraight,  // written from its source
    };
    struct Block {
        const uint8_t* data = nullptr;  // the slot, or the source of a straight one
        uint8_t* slot = nullptr;
        uint32_t copies_left = 0;
        Way way = kNow;
        bool begun = false, scanned = false;
    };
    struct DeviceCopy {
        uint64_t block;
        Pass pass;
        int device;
        bool urgent;
    };
    // What threads are to do next for blocks that were begun.
    struct Work {
        std::vector<Chunk> chunks;
        std::vector<DeviceCopy> device_copies;
        std::vector<uint64_t> straight;
    };

    void start(bool overlap, Check check);
    Way way_of(uint64_t block) const;
    void go_on(const std::vector<uint8_t*>& slots);
    void begin(uint64_t block, Work& work);
    void list_copies(uint64_t block, Pass pass, bool urgent, std::vector<Chunk>& chunks,
                     std::vector<DeviceCopy>& device_copies) const;
    void copy_from_device(const DeviceCopy& copy, void* stream, const std::string& error) noexcept;
    void copy_ended(uint64_t block, bool urgent);
    void scan(uint64_t block) noexcept;
    void check_unchanged(uint64_t block) const;  // throws SourceChanged
    void seal_scanned() noexcept;
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
    bool all_released() const;
    uint64_t missing_slots() const;
    void finish_if_through();
    void note_progress();

    Mover& mover_;
    const std::string path_;
    const std::shared_ptr<const Image> image_;
    const uint64_t block_bytes_, nblocks_;
    const uint64_t window_;  // slots for kWindow blocks: an eighth of the arena, so that several saves fit
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
    std::vector<uint8_t*> spare_;  // slots that wait for their block
    uint64_t begun_ = 0, through_ = 0, next_ = 0, next_to_seal_ = 0;
    uint64_t rush_end_ = 0, rush_left_ = 0;       // save() waits for slots up to here, and for so many
    uint64_t now_left_ = 0, slotless_ = 0;        // blocks not begun: kNow; all that need a slot
    uint64_t deferred_ = 0, window_slots_ = 0;    // on their way: not kNow; of those, the ones with a slot
    uint64_t copies_left_ = 0, urgent_left_ = 0;  // of kNow blocks
    uint64_t straight_bytes_ = 0;
    bool leases_ = false;  // some block is not kNow
    bool sealing_ = false, finishing_ = false, written_ = false, direct_held_ = false;
    double save_s_ = -1, copy_s_ = -1, write_s_ = -1;
};

// The threads that carry transfers. Make it once for an arena; any thread may save. Several transfers share
// the arena without deadlock: slots go to a file's blocks in order, or to all that hold other than leased
// bytes at once and at least one more for the rest; a block that has one needs nothing else.
class Mover {
  public:
    // Without `digests` the CRC-32s in the files and in Digest are 0: a benchmark shows what they cost.
    Mover(std::shared_ptr<Arena> arena, int copy_threads, int io_threads, bool direct, bool digests);
    ~Mover();

    // Begins a transfer and returns at once; the caller then drives advance() until it is true. Sources of
    // lazy extents must stay as they are until wait_copied, of leased ones until wait_released, all others
    // until advance() is true. What `check` finds changed by then fails the transfer with SourceChanged.
    std::shared_ptr<Transfer> begin(std::string path, std::shared_ptr<const Image> image, bool overlap,
                                    Check check);
    // Lets running transfers end until the deadline, then stops them. True: all threads have ended. False:
    // some hang in the operating system, and this object must never be destroyed.
    bool shutdown(Clock::time_point deadline);
    bool closed() const { return closed_; }

  private:
    friend class Transfer;
    std::shared_ptr<Arena> arena_;
    const bool direct_, digests_wanted_;
    std::atomic<bool> closed_{false};
    std::mutex mutex_;
    std::vector<std::weak_ptr<Transfer>> transfers_;
    ThreadPool io_, digests_;
    Copier copier_;  // last: its threads end first, they feed the others
};

}  // namespace roll
