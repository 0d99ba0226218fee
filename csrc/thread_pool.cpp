#include "thread_pool.h"

#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <exception>
#include <system_error>

namespace roll {

struct SignalsBlocked::Mask {
    sigset_t set;
};

SignalsBlocked::SignalsBlocked() : old_(std::make_unique<Mask>()) {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old_->set);
}

SignalsBlocked::~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &old_->set, nullptr); }

void name_this_thread(const char* name) { pthread_setname_np(pthread_self(), name); }

void lower_this_thread(int nice) {
    if (nice > 0) setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)), nice);
}

ThreadPool::ThreadPool(int threads, std::string name, int nice) : name_(std::move(name)), nice_(nice) {
    SignalsBlocked blocked;
    try {
        for (int i = 0; i < std::max(1, threads); ++i) {
            {
                std::lock_guard lock(mutex_);
                ++alive_;
            }
            try {
                threads_.emplace_back([this] { run(); });
            } catch (...) {
                std::lock_guard lock(mutex_);
                --alive_;
                throw;
            }
        }
    } catch (const std::system_error&) {
        if (threads_.empty()) throw;  // fewer threads than requested are slower, not wrong
    }
}

ThreadPool::~ThreadPool() { finish(Clock::time_point::max()); }

void ThreadPool::submit(std::function<void()> task, bool urgent) {
    {
        std::lock_guard lock(mutex_);
        (urgent ? urgent_ : tasks_).push_back(std::move(task));
    }
    wake_.notify_one();
}

bool ThreadPool::finish(Clock::time_point deadline) {
    std::unique_lock lock(mutex_);
    closing_ = true;
    wake_.notify_all();
    if (!wait_until(ended_, lock, deadline, [this] { return alive_ == 0; })) return false;
    lock.unlock();
    for (auto& thread : threads_) {
        if (thread.joinable()) thread.join();
    }
    threads_.clear();
    return true;
}

void ThreadPool::run() {
    name_this_thread(name_.c_str());
    lower_this_thread(nice_);
    std::unique_lock lock(mutex_);
    for (;;) {
        wake_.wait(lock, [this] { return closing_ || !urgent_.empty() || !tasks_.empty(); });
        auto& tasks = urgent_.empty() ? tasks_ : urgent_;
        if (tasks.empty()) break;
        auto task = std::move(tasks.front());
        tasks.pop_front();
        lock.unlock();
        task();
        task = nullptr;  // destroys what the task captured, outside the lock
        lock.lock();
    }
    --alive_;
    ended_.notify_all();
}

void in_parallel(int threads, const char* name, const std::function<void(const std::atomic<bool>&)>& work,
                 const std::function<bool()>& poll) {
    std::atomic<bool> cancelled{false};
    std::mutex mutex;
    std::condition_variable ended;
    std::exception_ptr error;
    size_t alive = 0;
    std::vector<std::thread> running;

    auto body = [&] {
        name_this_thread(name);
        try {
            work(cancelled);
        } catch (...) {
            std::lock_guard lock(mutex);
            if (!error) error = std::current_exception();
            cancelled = true;
        }
        std::lock_guard lock(mutex);
        --alive;
        ended.notify_all();
    };
    {
        SignalsBlocked blocked;
        for (int i = 0; i < std::max(1, threads); ++i) {
            {
                std::lock_guard lock(mutex);
                ++alive;
            }
            try {
                running.emplace_back(body);
            } catch (const std::system_error&) {
                std::lock_guard lock(mutex);
                --alive;
                if (running.empty()) throw;
                break;
            }
        }
    }
    std::unique_lock lock(mutex);
    while (!ended.wait_for(lock, std::chrono::milliseconds(100), [&] { return alive == 0; })) {
        lock.unlock();
        if (poll()) cancelled = true;
        lock.lock();
    }
    lock.unlock();
    for (auto& thread : running) thread.join();
    if (error) std::rethrow_exception(error);
}

}  // namespace roll
