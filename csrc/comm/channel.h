// Channel: interface to send bytes to one peer of a group and receive bytes from it, in order. No call waits: the
// communicator waits, for all channels and the group's abort word at once. Implementations: rings in shared memory
// (shm_channel.h) and TCP (tcp_channel.h). RDMA could be a third: space() returns a registered buffer, commit() posts it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace intaglio {

struct Bytes {
  uint8_t* data = nullptr;
  size_t size = 0;
};

class Channel {
 public:
  virtual ~Channel() = default;
  // Contiguous room for bytes to send; may be empty. commit() sends its first `count` bytes.
  virtual Bytes space() = 0;
  virtual void commit(size_t count) = 0;
  // Contiguous bytes that have arrived and were not consumed; may be empty. Throws std::runtime_error if the peer is gone.
  virtual Bytes arrived() = 0;
  virtual void consume(size_t count) = 0;
  // Sends what was committed, if it is not on its way.
  virtual void flush() {}
  // True if everything committed has left this process.
  virtual bool flushed() { return true; }
  // What to poll() for news of this channel, or -1 if the peer rings this rank's bell.
  virtual int descriptor() const { return -1; }
  // Lets the peer know that nothing more will come.
  virtual void close() {}
};

}  // namespace intaglio
