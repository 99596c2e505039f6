// The TCP channel: queues of bytes to and from a non-blocking socket.
#include "comm/tcp_channel.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>
#include <system_error>

namespace intaglio {

TcpChannel::TcpChannel(int socket) : socket_(socket) {
  const int flags = fcntl(socket, F_GETFL), on = 1;
  if (flags < 0 || fcntl(socket, F_SETFL, flags | O_NONBLOCK) < 0)
    throw std::system_error(errno, std::generic_category(), "the socket of a channel");
  setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);  // fails for sockets that are not TCP, which have no delay
}

TcpChannel::~TcpChannel() {
  if (socket_ >= 0) ::close(socket_);
}

void TcpChannel::close() {
  if (socket_ >= 0) shutdown(socket_, SHUT_RDWR);
}

Bytes TcpChannel::Queue::room() {
  if (begin == end) begin = end = 0;
  if (begin && bytes.size() - end < kPiece) {
    std::memmove(bytes.data(), bytes.data() + begin, size());
    end -= begin, begin = 0;
  }
  return {bytes.data() + end, bytes.size() - end};
}

Bytes TcpChannel::space() {
  if (out_.bytes.size() - out_.size() < kPiece) send_some();
  return out_.room();
}

void TcpChannel::commit(size_t count) {
  out_.end += count;
  if (out_.size() >= kPiece) send_some();
}

void TcpChannel::send_some() {
  while (out_.size()) {
    const ssize_t sent = ::send(socket_, out_.bytes.data() + out_.begin, out_.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0) {
      if (errno == EAGAIN || errno == EWOULDBLOCK) return;
      if (errno == EINTR) continue;
      throw std::runtime_error(std::string("cannot be sent to: ") + std::strerror(errno));
    }
    out_.begin += size_t(sent);
  }
}

bool TcpChannel::flushed() {
  send_some();
  return !out_.size();
}

Bytes TcpChannel::arrived() {
  if (in_.size() < kPiece) {
    const Bytes room = in_.room();
    const ssize_t got = ::recv(socket_, room.data, room.size, MSG_DONTWAIT);
    if (got > 0) in_.end += size_t(got);
    else if (!in_.size() && got == 0) throw std::runtime_error("closed the connection");
    else if (got < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)
      throw std::runtime_error(std::string("cannot be heard: ") + std::strerror(errno));
  }
  return {in_.bytes.data() + in_.begin, in_.size()};
}

void TcpChannel::consume(size_t count) { in_.begin += count; }

}  // namespace intaglio
