// Groups of ranks for unit tests: threads over one segment or several hosts' segments and TCP, or forked processes.
#pragma once
#include <netinet/in.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <map>
#include <stdexcept>
#include <thread>

#include "comm/communicator.h"
#include "comm/tcp_channel.h"

namespace intaglio::test {

constexpr int64_t kRing = 8192;  // small, so that messages wrap and wait for room

// The file of a segment; unlinked, so nothing of it stays.
struct SegmentFile {
  int file;
  explicit SegmentFile(int ranks, uint64_t epoch = 1, int64_t ring = kRing) : file(memfd_create("intaglio-test", MFD_CLOEXEC)) {
    if (file < 0 || ftruncate(file, Segment::bytes_for(ranks, ring))) throw std::runtime_error("no memory file");
    Segment::format(file, ranks, ring, epoch);
  }
  ~SegmentFile() { close(file); }
  SegmentFile(const SegmentFile&) = delete;
  std::shared_ptr<Segment> open() const { return std::make_shared<Segment>(file); }
};

// Runs f(communicator) as every rank, each in a thread, and returns what each threw, "" if nothing.
inline std::vector<std::string> as_threads(const std::shared_ptr<Segment>& segment, const std::function<void(Communicator&)>& f, double timeout = 60) {
  std::vector<std::string> errors(size_t(segment->ranks()));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < segment->ranks(); rank++)
    threads.emplace_back([&, rank] {
      try {
        Communicator c(segment, rank);
        c.timeout = timeout;
        f(c);
      } catch (const std::exception& error) {
        errors[size_t(rank)] = error.what();
      }
    });
  for (std::thread& t : threads) t.join();
  return errors;
}

// Two ends of a TCP connection over loopback.
inline std::pair<int, int> tcp_pair() {
  const int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in at{};
  at.sin_family = AF_INET, at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof at;
  auto address = reinterpret_cast<sockaddr*>(&at);
  if (listener < 0 || bind(listener, address, size) || listen(listener, 1) || getsockname(listener, address, &size))
    throw std::runtime_error("no listener");
  const int one = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (connect(one, address, size)) throw std::runtime_error("no connection");
  const int other = accept(listener, nullptr, nullptr);
  close(listener);
  return {one, other};
}

// A TCP channel that counts the bytes sent.
struct CountedChannel : TcpChannel {
  std::atomic<int64_t>& sent;
  CountedChannel(int socket, std::atomic<int64_t>& sent) : TcpChannel(socket), sent(sent) {}
  void commit(size_t count) override { sent += int64_t(count), TcpChannel::commit(count); }
};

// Runs f as every rank in a thread, as as_threads() does; ranks of unlike hosts have a segment each and speak by TCP. sent: bytes
// that all ranks send to other hosts.
inline std::vector<std::string> as_hosts(const std::vector<int>& host_of, const std::function<void(Communicator&)>& f, double timeout = 60,
                                         std::atomic<int64_t>* sent = nullptr) {
  std::atomic<int64_t> unread{0};
  const int ranks = int(host_of.size());
  std::map<int, std::shared_ptr<Segment>> segments;
  for (int host : host_of)
    if (!segments.count(host)) segments[host] = SegmentFile(ranks).open();
  std::vector<std::vector<std::unique_ptr<Channel>>> channels(host_of.size());
  for (auto& own : channels) own.resize(host_of.size());
  for (int a = 0; a < ranks; a++)
    for (int b = a + 1; b < ranks; b++)
      if (host_of[size_t(a)] != host_of[size_t(b)]) {
        const auto [one, other] = tcp_pair();
        channels[size_t(a)][size_t(b)] = std::make_unique<CountedChannel>(one, sent ? *sent : unread);
        channels[size_t(b)][size_t(a)] = std::make_unique<CountedChannel>(other, sent ? *sent : unread);
      }
  std::vector<std::string> errors(host_of.size());
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; rank++)
    threads.emplace_back([&, rank] {
      try {
        Communicator c(segments.at(host_of[size_t(rank)]), rank, std::move(channels[size_t(rank)]));
        c.timeout = timeout;
        f(c);
      } catch (const std::exception& error) {
        errors[size_t(rank)] = error.what();
      }
    });
  for (std::thread& t : threads) t.join();
  return errors;
}

// The same with a process a rank; returns exit statuses: 0, 1 if f threw, 128 + signal.
inline std::vector<int> as_processes(const SegmentFile& file, int ranks, const std::function<void(Communicator&)>& f) {
  std::vector<pid_t> pids;
  for (int rank = 0; rank < ranks; rank++) {
    const pid_t pid = fork();
    if (pid < 0) throw std::runtime_error("no fork");
    if (!pid) {
      int status = 0;
      try {
        Communicator c(file.open(), rank);
        c.timeout = 60;
        f(c);
      } catch (...) {
        status = 1;
      }
      _exit(status);
    }
    pids.push_back(pid);
  }
  std::vector<int> statuses;
  for (pid_t pid : pids) {
    int status = 0;
    waitpid(pid, &status, 0);
    statuses.push_back(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
  }
  return statuses;
}

}  // namespace intaglio::test
