// Copies the bytes of an image into the slots of its blocks. Its threads do nothing but copy, so a caller
// that waits for a copy never waits for a digest or a disk.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_api.h"
#include "image.h"
#include "thread_pool.h"

namespace roll {

// Which bytes a pass over a range copies. The pass that copies lazy bytes also zeroes the gaps.
enum Pass : uint8_t { kEager = 1, kLazy = 2, kEverything = 3 };

// A range [start, end) of the file whose host bytes are to be copied into block `block`.
struct Chunk {
    uint64_t block, start, end;
    Pass pass;
    bool urgent;  // save() waits for it
};

constexpr uint64_t kChunkBytes = 2 << 20;

// Whether a pass over [start, end) of the file would write any host byte.
bool has_host_bytes(const Image& image, uint64_t start, uint64_t end, Pass pass);
void copy_host_bytes(const Image& image, uint64_t start, uint64_t end, Pass pass, uint8_t* target);
std::vector<cuda::Region> device_regions(const Image& image, uint64_t start, uint64_t end, Pass pass,
                                         int device, uint8_t* target);

// The owner of chunks that are to be copied.
class CopyJob {
  public:
    virtual ~CopyJob() = default;
    virtual void copy(const Chunk& chunk) noexcept = 0;
};

// A queue of chunks and the threads that empty it. Any thread may call any method.
class Copier {
  public:
    explicit Copier(int threads);  // with 0 threads, host bytes are copied by help() alone
    ~Copier();

    void submit(const std::shared_ptr<CopyJob>& job, const std::vector<Chunk>& chunks);
    // Copies one chunk of `job` on the calling thread; false if the queue holds none.
    bool help(const CopyJob* job, bool urgent_only);
    // Runs task(stream, error) on a thread of that device; urgent tasks, which save() waits for, come before
    // the late copies of earlier files. `stream` is null if it could not be created; then `error` says why.
    void submit_device(int device, bool urgent,
                       std::function<void(void* stream, const std::string& error)> task);
    bool finish(Clock::time_point deadline);  // as ThreadPool::finish

  private:
    struct Lane {
        std::shared_ptr<CopyJob> job;
        std::deque<Chunk> urgent, later;
    };
    bool take(const CopyJob* only, bool urgent_only, std::shared_ptr<CopyJob>& job, Chunk& chunk);
    void run();

    std::mutex mutex_;
    std::condition_variable wake_, ended_;
    std::deque<Lane> lanes_;
    std::vector<std::thread> threads_;
    std::map<int, std::unique_ptr<ThreadPool>> devices_;
    size_t alive_ = 0;
    bool closing_ = false;
};

}  // namespace roll
