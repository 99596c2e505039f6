// Unit tests of the thread that calls a function at an interval, and of the heartbeats and datagrams that it sends.
#include "comm/interval.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <thread>

#include "comm/datagrams.h"
#include "comm/heartbeat.h"
#include "test/check.h"

namespace intaglio {
namespace {

constexpr double kLong = 3600.0;  // seconds: no test waits for a second call

void wait_until(const std::function<bool()>& done) {
  while (!done()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

TEST(an_interval_calls_at_once_and_again) {
  std::atomic<int> calls{0};
  Interval interval(1e-4, [&] { calls++; });
  wait_until([&] { return calls >= 3; });
}

TEST(an_interval_ends_without_waiting_for_the_next_call) {
  std::atomic<int> calls{0};
  {
    Interval interval(kLong, [&] { calls++; });
    wait_until([&] { return calls == 1; });
  }
  CHECK_EQUAL(calls.load(), 1);
}

TEST(an_interval_ends_after_the_call_that_runs) {
  std::atomic<bool> began{false}, ended{false};
  {
    Interval interval(kLong, [&] {
      began = true;
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      ended = true;
    });
    wait_until([&] { return began.load(); });
  }
  CHECK(ended);
}

TEST(a_heartbeat_counts_the_beats_of_its_rank) {
  const int file = memfd_create("beats", 0);
  CHECK(file >= 0 && !ftruncate(file, Segment::bytes_for(2, 4096)));
  Segment::format(file, 2, 4096, 1);
  auto segment = std::make_shared<Segment>(file);
  close(file);
  const auto before = segment->beats(0);
  {
    Heartbeat heart(segment, 1, 1e-4);
    wait_until([&] { return segment->beats(1) >= 3; });
  }
  CHECK_EQUAL(segment->beats(0), before);
  const auto last = segment->beats(1);
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  CHECK_EQUAL(segment->beats(1), last);
}

TEST(datagrams_leave_in_order_on_a_descriptor_of_their_own) {
  int ends[2];
  CHECK(!socketpair(AF_UNIX, SOCK_DGRAM, 0, ends));
  {
    Datagrams sender(ends[0], 1e-3);
    close(ends[0]);
    for (const char* text : {"one", "two", "three"}) sender.add(text);
    for (const std::string wanted : {"one", "two", "three"}) {
      char got[16];
      const auto n = recv(ends[1], got, sizeof(got), 0);
      CHECK_EQUAL(std::string(got, size_t(std::max<ssize_t>(n, 0))), wanted);
    }
    CHECK_EQUAL(sender.waiting(), 0);
  }
  close(ends[1]);
}

TEST(datagrams_need_a_descriptor) {
  CHECK_THROWS(std::system_error, Datagrams(-1, kLong), "a descriptor for the socket of datagrams: Bad file descriptor");
}

}  // namespace
}  // namespace intaglio
