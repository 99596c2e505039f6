// A thread that shows that a rank's process runs: it counts up the rank's beats in the segment.
#pragma once
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

#include "comm/segment.h"

namespace intaglio {

class Heartbeat {
 public:
  Heartbeat(std::shared_ptr<Segment> segment, int rank, double seconds)
      : segment_(std::move(segment)), thread_([this, rank, seconds] {
          std::unique_lock<std::mutex> lock(mutex_);
          do segment_->beat(rank);
          while (!stopped_.wait_for(lock, std::chrono::duration<double>(seconds), [this] { return stop_; }));
        }) {}
  Heartbeat(const Heartbeat&) = delete;
  ~Heartbeat() {
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
  std::shared_ptr<Segment> segment_;  // not held by the thread: letting go of it may need Python's lock, which whoever joins has
  std::thread thread_;
};

}  // namespace intaglio
