// Channel: bytes to and from one peer of a group, in order, in both directions. No call waits; waiting is the
// communicator's business, which watches all channels and the group's abort word at once. Implementations: rings in shared
// memory (shm_channel.h) and TCP (tcp_channel.h). RDMA would be a third: space() its registered buffer, commit() a post.
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
