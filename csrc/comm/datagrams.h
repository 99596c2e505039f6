// A thread that sends datagrams at an interval, in the order in which they were added. It does not need Python's lock, so the
// other end hears from this process even while Python code keeps the lock.
#pragma once
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <string>
#include <thread>

namespace intaglio {

class Datagrams {
 public:
  // socket: a connected one, of which this object has its own descriptor. seconds: the interval.
  Datagrams(int socket, double seconds) : socket_(dup(socket)), thread_([this, seconds] {
          std::unique_lock<std::mutex> lock(mutex_);
          do {
            if (waiting_.empty()) continue;
            send(socket_, waiting_.front().data(), waiting_.front().size(), MSG_DONTWAIT | MSG_NOSIGNAL);  // a lost one is not sent again
            waiting_.pop_front();
          } while (!stopped_.wait_for(lock, std::chrono::duration<double>(seconds), [this] { return stop_; }));
        }) {}
  Datagrams(const Datagrams&) = delete;
  ~Datagrams() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    stopped_.notify_all();
    thread_.join();
    close(socket_);
  }

  void add(std::string datagram) {
    std::lock_guard<std::mutex> lock(mutex_);
    waiting_.push_back(std::move(datagram));
  }
  int64_t waiting() {
    std::lock_guard<std::mutex> lock(mutex_);
    return int64_t(waiting_.size());
  }

 private:
  std::mutex mutex_;
  std::condition_variable stopped_;
  bool stop_ = false;
  int socket_;
  std::deque<std::string> waiting_;
  std::thread thread_;
};

}  // namespace intaglio
