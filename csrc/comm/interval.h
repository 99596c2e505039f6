// Interval: a thread that calls a function at once and then at an interval, until the object is destroyed. The thread does
// not need the GIL, so it runs even while Python code holds the GIL.
#pragma once
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

namespace intaglio {

class Interval {
 public:
  // seconds: the interval, from the end of one call to the start of the next. `call` must not throw.
  Interval(double seconds, std::function<void()> call)
      : thread_([this, seconds, call = std::move(call)] {
          std::unique_lock<std::mutex> lock(mutex_);
          while (!stop_) {
            lock.unlock();
            call();
            lock.lock();
            stopped_.wait_for(lock, std::chrono::duration<double>(seconds), [this] { return stop_; });
          }
        }) {}
  Interval(const Interval&) = delete;
  // Waits for a call that is running. None starts afterwards.
  ~Interval() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    stopped_.notify_all();
    thread_.join();
  }

 private:
  std::mutex mutex_;
  std::condition_variable stopped_;
  bool stop_ = false;
  std::thread thread_;  // last, as it reads the others
};

}  // namespace intaglio
