// Datagrams: a thread that sends datagrams at an interval, in the order in which they were added. So the other end hears
// from this process even while Python code holds the GIL.
#pragma once
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <deque>
#include <mutex>
#include <string>
#include <system_error>

#include "comm/interval.h"

namespace intaglio {

class Datagrams {
 public:
  // socket: a connected one, of which this object has its own descriptor. seconds: the interval. Throws std::system_error if
  // there is no descriptor for it.
  Datagrams(int socket, double seconds) : socket_(socket), interval_(seconds, [this] { send_first(); }) {}

  void add(std::string datagram) {
    std::lock_guard<std::mutex> lock(mutex_);
    waiting_.push_back(std::move(datagram));
  }
  int64_t waiting() {
    std::lock_guard<std::mutex> lock(mutex_);
    return int64_t(waiting_.size());
  }

 private:
  class Descriptor {
   public:
    explicit Descriptor(int of) : number(dup(of)) {
      if (number < 0) throw std::system_error(errno, std::generic_category(), "a descriptor for the socket of datagrams");
    }
    Descriptor(const Descriptor&) = delete;
    ~Descriptor() { close(number); }
    const int number;
  };

  void send_first() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (waiting_.empty()) return;
    send(socket_.number, waiting_.front().data(), waiting_.front().size(), MSG_DONTWAIT | MSG_NOSIGNAL);  // a lost one is not sent again
    waiting_.pop_front();
  }

  std::mutex mutex_;
  std::deque<std::string> waiting_;
  Descriptor socket_;
  Interval interval_;  // last: its thread ends before what it uses
};

}  // namespace intaglio
