#include "copier.h"

#include <algorithm>
#include <cstring>
#include <system_error>

namespace roll {
namespace {

bool is_in(Pass pass, const Extent& extent) { return (pass & (extent.lazy ? kLazy : kEager)) != 0; }

// Visits the extents and gaps of [start, end) in order: on_extent(extent, from, to), on_gap(from, to). A
// visitor returns false to stop.
template <class OnExtent, class OnGap>
void walk(const Image& image, uint64_t start, uint64_t end, OnExtent on_extent, OnGap on_gap) {
    auto extent = std::partition_point(image.extents().begin(), image.extents().end(),
                                       [start](const Extent& e) { return e.end() <= start; });
    uint64_t at = start;
    for (; extent != image.extents().end() && extent->offset < end; ++extent) {
        uint64_t from = std::max(extent->offset, start), to = std::min(extent->end(), end);
        if (at < from && !on_gap(at, from)) return;
        if (!on_extent(*extent, from, to)) return;
        at = to;
    }
    if (at < end) on_gap(at, end);
}

// The stream of one native thread on its device, created at the thread's first copy.
struct ThreadStream {
    void* stream = nullptr;
    ~ThreadStream() {
        if (stream) cuda::table().close_stream(stream);
    }
};

}  // namespace

bool has_host_bytes(const Image& image, uint64_t start, uint64_t end, Pass pass) {
    bool has_bytes = false;
    walk(
        image, start, end,
        [&](const Extent& extent, uint64_t, uint64_t) {
            has_bytes = extent.device < 0 && is_in(pass, extent);
            return !has_bytes;
        },
        [&](uint64_t, uint64_t) {
            has_bytes = (pass & kLazy) != 0;
            return !has_bytes;
        });
    return has_bytes;
}

void copy_host_bytes(const Image& image, uint64_t start, uint64_t end, Pass pass, uint8_t* target) {
    walk(
        image, start, end,
        [&](const Extent& extent, uint64_t from, uint64_t to) {
            if (extent.device < 0 && is_in(pass, extent)) {
                auto source = reinterpret_cast<const uint8_t*>(extent.address) + (from - extent.offset);
                std::memcpy(target + (from - start), source, to - from);
            }
            return true;
        },
        [&](uint64_t from, uint64_t to) {
            if (pass & kLazy) std::memset(target + (from - start), 0, to - from);
            return true;
        });
}

std::vector<cuda::Region> device_regions(const Image& image, uint64_t start, uint64_t end, Pass pass,
                                         int device, uint8_t* target) {
    std::vector<cuda::Region> regions;
    walk(
        image, start, end,
        [&](const Extent& extent, uint64_t from, uint64_t to) {
            if (extent.device == device && is_in(pass, extent)) {
                auto source = reinterpret_cast<const uint8_t*>(extent.address) + (from - extent.offset);
                regions.push_back({source, target + (from - start), to - from});
            }
            return true;
        },
        [](uint64_t, uint64_t) { return true; });
    return regions;
}

Copier::Copier(int threads) {
    SignalsBlocked blocked;
    std::lock_guard lock(mutex_);  // no thread looks at lanes_ before all have started
    for (int i = 0; i < threads; ++i) {
        try {
            threads_.emplace_back([this] { run(); });
            ++alive_;
        } catch (const std::system_error&) {
            if (threads_.empty()) throw;
            break;
        }
    }
}

Copier::~Copier() { finish(Clock::time_point::max()); }

bool Copier::finish(Clock::time_point deadline) {
    std::unique_lock lock(mutex_);
    closing_ = true;
    wake_.notify_all();
    if (!wait_until(ended_, lock, deadline, [this] { return alive_ == 0; })) return false;
    auto devices = std::move(devices_);
    devices_.clear();
    lock.unlock();
    for (auto& thread : threads_) thread.join();
    threads_.clear();
    for (auto& [device, pool] : devices) {
        if (!pool->finish(deadline)) {
            for (auto& [_, left] : devices) (void)left.release();  // their threads still use them
            return false;
        }
    }
    return true;
}

void Copier::submit(const std::shared_ptr<CopyJob>& job, const std::vector<Chunk>& chunks) {
    if (chunks.empty()) return;
    {
        std::lock_guard lock(mutex_);
        auto lane = std::find_if(lanes_.begin(), lanes_.end(), [&](const Lane& l) { return l.job == job; });
        if (lane == lanes_.end()) lane = lanes_.insert(lanes_.end(), Lane{job, {}, {}});
        for (const Chunk& chunk : chunks) (chunk.urgent ? lane->urgent : lane->later).push_back(chunk);
    }
    wake_.notify_all();
}

// With mutex_ held: takes the next chunk, of `only` this job unless it is null; urgent chunks come first.
bool Copier::take(const CopyJob* only, bool urgent_only, std::shared_ptr<CopyJob>& job, Chunk& chunk) {
    for (bool urgent : {true, false}) {
        if (!urgent && urgent_only) break;
        for (auto lane = lanes_.begin(); lane != lanes_.end(); ++lane) {
            auto& queue = urgent ? lane->urgent : lane->later;
            if (queue.empty() || (only && lane->job.get() != only)) continue;
            chunk = queue.front();
            queue.pop_front();
            job = lane->job;
            if (lane->urgent.empty() && lane->later.empty()) lanes_.erase(lane);
            return true;
        }
    }
    return false;
}

bool Copier::help(const CopyJob* only, bool urgent_only) {
    std::shared_ptr<CopyJob> job;
    Chunk chunk;
    {
        std::lock_guard lock(mutex_);
        if (!take(only, urgent_only, job, chunk)) return false;
    }
    job->copy(chunk);
    return true;
}

void Copier::run() {
    name_this_thread("roll-copy");
    std::unique_lock lock(mutex_);
    for (;;) {
        std::shared_ptr<CopyJob> job;
        Chunk chunk;
        if (take(nullptr, false, job, chunk)) {
            lock.unlock();
            job->copy(chunk);
            job.reset();
            lock.lock();
        } else if (closing_) {
            break;
        } else {
            wake_.wait(lock);
        }
    }
    --alive_;
    ended_.notify_all();
}

void Copier::submit_device(int device, bool urgent, std::function<void(void*, const std::string&)> task) {
    std::lock_guard lock(mutex_);
    auto& pool = devices_[device];
    // A block crosses the bus in about the time that its thread needs to wake up and finish it. Several
    // threads, each with its stream, keep the copy engine busy meanwhile.
    if (!pool) pool = std::make_unique<ThreadPool>(4, "roll-device", 0);
    auto run = [device, task = std::move(task)] {
        thread_local ThreadStream own;
        std::string error;
        try {
            if (!own.stream) {
                cuda::table().use(device);
                own.stream = cuda::table().open_stream();
            }
        } catch (const std::exception& failure) {
            error = failure.what();
        }
        task(own.stream, error);
    };
    pool->submit(std::move(run), urgent);
}

}  // namespace roll
