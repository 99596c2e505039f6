// TcpChannel: a channel to a rank of another host over TCP. Committed bytes are sent in pieces, as the socket takes them;
// after push() the last piece is sent without delay (no waiting for further bytes). The socket is handed to this class
// when both ends have proved that they know the group's token (devices/processes/connections.py).
#pragma once
#include <vector>

#include "comm/channel.h"

namespace intaglio {

class TcpChannel : public Channel {
 public:
  // Takes the connected socket over. Throws system_error if it is none.
  explicit TcpChannel(int socket);
  ~TcpChannel() override;
  TcpChannel(const TcpChannel&) = delete;

  Bytes space() override;
  void commit(size_t count) override;
  Bytes arrived() override;
  void consume(size_t count) override;
  void flush() override { send_some(); }
  bool flushed() override;
  int descriptor() const override { return socket_; }
  void close() override;

 private:
  static constexpr size_t kBuffer = 256 << 10, kPiece = 32 << 10;
  // Bytes begin..end of a buffer, moved to its front when little room is left behind them.
  struct Queue {
    std::vector<uint8_t> bytes = std::vector<uint8_t>(kBuffer);
    size_t begin = 0, end = 0;
    size_t size() const { return end - begin; }
    Bytes room();
  };
  void send_some();

  int socket_;
  Queue out_, in_;
};

}  // namespace intaglio
