// Native threads. Each blocks every signal, has a name, and never touches Python.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace roll {

using Clock = std::chrono::steady_clock;

// Waits until done() is true, at most until `deadline`; returns done(). Clock::time_point::max() waits
// without end.
template <class Done>
bool wait_until(std::condition_variable& changed, std::unique_lock<std::mutex>& lock,
                Clock::time_point deadline, Done done) {
    if (deadline != Clock::time_point::max()) return changed.wait_until(lock, deadline, done);
    changed.wait(lock, done);
    return true;
}

// Blocks all signals in the calling thread during its lifetime; threads started meanwhile inherit the mask.
class SignalsBlocked {
  public:
    SignalsBlocked();
    ~SignalsBlocked();
    SignalsBlocked(const SignalsBlocked&) = delete;
    SignalsBlocked& operator=(const SignalsBlocked&) = delete;

  private:
    struct Mask;
    std::unique_ptr<Mask> old_;
};

void name_this_thread(const char* name);
void lower_this_thread(int nice);  // best effort; affects this thread alone

// Runs tasks in the order of their submission, urgent ones before all others. A task must not throw.
class ThreadPool {
  public:
    ThreadPool(int threads, std::string name, int nice);
    ~ThreadPool();  // runs all submitted tasks, then joins

    void submit(std::function<void()> task, bool urgent = false);
    // Ends the threads once the queue is empty. False if they have not ended by the deadline: then the pool
    // must never be destroyed, because its threads still use it.
    bool finish(Clock::time_point deadline);

  private:
    void run();

    std::mutex mutex_;
    std::condition_variable wake_, ended_;
    std::deque<std::function<void()>> urgent_, tasks_;
    std::vector<std::thread> threads_;
    std::string name_;
    int nice_;
    size_t alive_ = 0;
    bool closing_ = false;
};

// Runs work(cancelled) on `threads` new threads, waits for all of them and rethrows the first exception. The
// waiting thread calls `poll` about ten times a second; `cancelled` is set once it returns true.
void in_parallel(int threads, const char* name, const std::function<void(const std::atomic<bool>&)>& work,
                 const std::function<bool()>& poll);

}  // namespace roll
