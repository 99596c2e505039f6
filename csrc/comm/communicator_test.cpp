// Unit tests of communicators and segments: sums and their bits, deadlines, aborts, killed processes, bad messages.
#include "comm/communicator.h"

#include <signal.h>

#include <bit>
#include <cstring>
#include <random>

#include "comm/testing.h"
#include "test/check.h"

namespace intaglio {
namespace {

using test::as_hosts;
using test::as_processes;
using test::as_threads;
using test::SegmentFile;

float bf16(float f) {  // by division of the interval: slow, and of another make than the communicator's
  if (f == 0) return f;
  int e;
  std::frexp(f, &e);
  const float unit = std::ldexp(1.0f, e - 8), low = std::floor(f / unit) * unit, high = low + unit;
  if (f - low != high - f) return f - low < high - f ? low : high;
  return std::fmod(low / unit, 2.0f) == 0 ? low : high;
}
float rounded(Wire wire, float f) { return wire == Wire::F32 ? f : wire == Wire::BF16 ? bf16(f) : float(_Float16(f)); }

// A tensor with more columns between rows than it has.
struct Rows {
  std::vector<float> values;
  Block block;
  Rows(int64_t rows, int64_t cols, int64_t gap) : values(size_t(rows * (cols + gap)) + 1, -77.0f), block{values.data(), rows, cols, cols + gap} {}
  float& at(int64_t r, int64_t c) { return block.data[r * block.ld + c]; }
};

// What a rank brings: the same in every process.
Rows random_rows(int seed, int rank, int64_t rows, int64_t cols, int64_t gap) {
  std::mt19937 random(unsigned(seed * 1000 + rank));
  std::normal_distribution<float> normal;
  Rows x(rows, cols, gap);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < cols; c++) x.at(r, c) = normal(random);
  return x;
}

int64_t begin_of(int64_t rows, int i, int n) { return (rows * i + n - 1) / n; }

struct Shape {
  int64_t rows, cols, gap, out_gap;
};

void check_rows(Rows& got, const std::function<float(int64_t, int64_t)>& wanted) {
  for (int64_t r = 0; r < got.block.rows; r++) {
    for (int64_t c = 0; c < got.block.cols; c++) CHECK_EQUAL(std::bit_cast<uint32_t>(got.at(r, c)), std::bit_cast<uint32_t>(wanted(r, c)));
    for (int64_t c = got.block.cols; c < got.block.ld; c++) CHECK_EQUAL(got.at(r, c), -77.0f);  // nothing beside it is touched
  }
}

void check_all(Communicator& comm, const std::vector<int>& group, int seed, Shape s, Wire wire) {
  const int n = int(group.size()), me = int(std::find(group.begin(), group.end(), comm.rank()) - group.begin());
  const Collective c{"site" + std::to_string(seed), group, wire};
  std::vector<Rows> brought, unlike;
  for (int i = 0; i < n; i++) {
    brought.push_back(random_rows(seed, group[size_t(i)], s.rows, s.cols, s.gap));
    unlike.push_back(random_rows(seed + 500, group[size_t(i)], s.rows, s.cols + i, s.gap));
  }
  auto sum = [&](int64_t r, int64_t col) {
    float total = rounded(wire, brought[0].at(r, col));
    for (int i = 1; i < n; i++) total += rounded(wire, brought[size_t(i)].at(r, col));
    return rounded(wire, total);
  };
  auto beside = [&](int64_t r, int64_t col) {
    int i = 0;
    for (; col >= s.cols + i; i++) col -= s.cols + i;
    return rounded(wire, unlike[size_t(i)].at(r, col));
  };
  int64_t width = 0;
  for (int i = 0; i < n; i++) width += s.cols + i;
  for (auto algorithm : {AllReduceAlgorithm::OneShot, AllReduceAlgorithm::TwoShot, AllReduceAlgorithm::Automatic}) {
    Rows out(s.rows, s.cols, s.out_gap);
    comm.algorithm = algorithm;
    comm.all_reduce(c, brought[size_t(me)].block, out.block);
    check_rows(out, sum);
    if (!comm.adds_on_arrival(c, s.rows * s.cols)) continue;
    Rows more = random_rows(seed + 900, me, s.rows, s.cols, s.gap), beside(s.rows, s.cols, s.out_gap), over = brought[size_t(me)];
    over.block.data = over.values.data();
    auto with_more = [&](int64_t r, int64_t col) { return more.at(r, col) + sum(r, col); };
    comm.all_reduce(c, brought[size_t(me)].block, out.block, {more.block, beside.block});
    check_rows(beside, with_more);
    comm.all_reduce(c, over.block, out.block, {more.block, over.block});  // the total takes the place of x
    check_rows(over, with_more);
  }
  Rows gathered(s.rows, width, s.out_gap);
  comm.all_gather(c, unlike[size_t(me)].block, gathered.block, false);
  check_rows(gathered, beside);

  const int64_t first = begin_of(s.rows, me, n), count = begin_of(s.rows, me + 1, n) - first;
  Rows whole(s.rows, s.cols, s.out_gap), share(count, s.cols, s.out_gap), turned(count, width, s.out_gap);
  comm.all_gather(c, brought[size_t(me)].block.rows_of(first, count), whole.block, true);
  check_rows(whole, [&](int64_t r, int64_t col) {
    int i = 0;
    while (r >= begin_of(s.rows, i + 1, n)) i++;
    return rounded(wire, brought[size_t(i)].at(r, col));
  });
  comm.reduce_scatter(c, brought[size_t(me)].block, share.block);
  check_rows(share, [&](int64_t r, int64_t col) { return sum(first + r, col); });
  comm.all_to_all(c, unlike[size_t(me)].block, turned.block);
  check_rows(turned, [&](int64_t r, int64_t col) { return beside(first + r, col); });
}

// Everything once, with shapes that wrap the ring, of no rows, of fewer rows than ranks, and in subgroups.
void many(Communicator& comm) {
  const Shape shapes[] = {{1, 64, 0, 0}, {3, 17, 5, 2}, {0, 8, 0, 0}, {200, 33, 0, 7}, {70, 130, 3, 0}};
  std::vector<int> all;
  for (int i = 0; i < comm.ranks(); i++) all.push_back(i);
  int seed = 0;
  for (const Shape& s : shapes)
    for (Wire wire : {Wire::F32, Wire::BF16, Wire::F16}) {
      check_all(comm, all, ++seed, s, wire);
      if (comm.ranks() > 2 && comm.rank() != 1) check_all(comm, {0, comm.ranks() - 1}, seed + 100, s, wire);
    }
  comm.barrier("end");
}

void no_errors(const std::vector<std::string>& errors) {
  for (const std::string& error : errors) CHECK_EQUAL(error, std::string());
}

TEST(communicator_threads_get_the_sums_in_rank_order_and_the_parts_in_place) {
  for (int ranks : {1, 2, 3}) no_errors(as_threads(SegmentFile(ranks).open(), many));
  no_errors(as_threads(SegmentFile(4, 1, 4096).open(), [](Communicator& comm) {
    check_all(comm, comm.rank() < 2 ? std::vector{0, 1} : std::vector{2, 3}, 5, {60, 33, 0, 0}, Wire::F32);
    check_all(comm, {0, 1, 2, 3}, 6, {31, 65, 1, 0}, Wire::BF16);
  }));
}

TEST(communicator_processes_get_the_same) {
  const SegmentFile file(3);
  for (int status : as_processes(file, 3, many)) CHECK_EQUAL(status, 0);
}

TEST(communicator_hosts_joined_by_tcp_get_the_same) {
  for (const std::vector<int>& hosts : {std::vector{0, 1}, std::vector{0, 0, 1}, std::vector{0, 1, 2}}) no_errors(as_hosts(hosts, many));
  no_errors(as_hosts({0, 0, 1, 1}, [](Communicator& comm) {
    check_all(comm, {0, 1, 2, 3}, 9, {301, 700, 0, 0}, Wire::F32);  // more than the buffers of the sockets hold
  }));
}

TEST(communicator_hosts_of_several_ranks_send_each_value_once_and_sum_in_rank_order) {
  const Shape shape{64, 1024, 3, 5};
  const int64_t values = 64 * 1024 * 4;
  for (auto [hosts, ranks] : {std::pair{2, 2}, std::pair{2, 3}, std::pair{3, 3}, std::pair{3, 2}}) {
    std::vector<int> host_of;
    for (int i = 0; i < hosts * ranks; i++) host_of.push_back(i / ranks);
    int64_t bytes[2];
    for (int chained : {0, 1}) {
      std::atomic<int64_t> sent{0};
      no_errors(as_hosts(host_of, [&, ranks = ranks](Communicator& comm) {
        comm.ranks_per_host = chained ? ranks : 0;
        std::vector<int> all;
        std::vector<Rows> brought;
        for (int i = 0; i < comm.ranks(); i++) all.push_back(i), brought.push_back(random_rows(7, i, shape.rows, shape.cols, shape.gap));
        Rows out(shape.rows, shape.cols, shape.out_gap);
        comm.all_reduce({"sum", all, Wire::F32}, brought[size_t(comm.rank())].block, out.block);
        check_rows(out, [&](int64_t r, int64_t col) {
          float total = brought[0].at(r, col);
          for (size_t i = 1; i < brought.size(); i++) total += brought[i].at(r, col);
          return total;
        });
      }, 60, &sent));
      bytes[chained] = sent;
    }
    std::printf("  %d hosts of %d ranks, all_reduce of %lld KiB: %lld KiB between hosts in two_shot, %lld in a chain\n", hosts, ranks,
                (long long)values >> 10, (long long)bytes[0] >> 10, (long long)bytes[1] >> 10);
    // A chain sends one host after the other, two_shot all at once: more hosts than ranks would wait longer for fewer bytes.
    const int64_t chain_time = 2 * (hosts - 1) * values, two_shot_time = bytes[0] / hosts;
    CHECK((hosts <= ranks) == (chain_time <= two_shot_time));
    if (hosts <= ranks) {
      CHECK(bytes[1] >= 2 * (hosts - 1) * values && bytes[1] < 2 * (hosts - 1) * values + 128 * hosts * ranks * 2);
      CHECK(bytes[1] < bytes[0]);
    } else {
      CHECK_EQUAL(bytes[1], bytes[0]);
    }
  }
  no_errors(as_hosts({0, 0, 1, 1}, [](Communicator& comm) {
    comm.ranks_per_host = 2;
    int seed = 10;
    for (const Shape& s : {Shape{301, 700, 0, 3}, Shape{0, 8, 0, 0}, Shape{129, 131, 2, 0}})
      for (Wire wire : {Wire::F32, Wire::BF16}) check_all(comm, {0, 1, 2, 3}, ++seed, s, wire);
    check_all(comm, comm.rank() < 2 ? std::vector{0, 1} : std::vector{2, 3}, 20, {64, 512, 0, 0}, Wire::F32);
    check_all(comm, comm.rank() % 2 ? std::vector{1, 3} : std::vector{0, 2}, 21, {64, 512, 0, 0}, Wire::F32);
  }));
}

TEST(communicator_a_rank_of_another_host_that_fails_is_noticed) {
  auto errors = as_hosts({0, 0, 1}, [](Communicator& comm) {
    Rows x(300, 800, 0), out(300, 800, 0);
    comm.all_reduce({"a", {0, 1, 2}, Wire::F32}, x.block, out.block);
    if (comm.rank() == 2) comm.fail("b", "out of memory");
    comm.all_reduce({"c", {0, 1, 2}, Wire::F32}, x.block, out.block);
  });
  CHECK_EQUAL(errors[2], std::string("rank 2 at b: out of memory"));
  for (int rank : {0, 1}) CHECK(errors[size_t(rank)].find("rank 2 c") != std::string::npos);  // closed, or cannot be sent to
}

TEST(communicator_send_waits_for_nobody_and_copies_what_does_not_fit) {
  no_errors(as_threads(SegmentFile(2).open(), [](Communicator& comm) {
    std::vector<Rows> all;
    for (int i = 0; i < 6; i++) all.push_back(random_rows(i, 0, 100, 61, i % 2));
    if (comm.rank() == 0) {
      for (Rows& x : all) {
        Rows sent = x;
        sent.block.data = sent.values.data();
        comm.send("a", 1, Wire::BF16, sent.block);  // far more than the ring: nobody receives yet
      }
      Rows back(1, 1, 0);
      comm.recv("b", 1, Wire::F32, back.block);
      CHECK_EQUAL(back.at(0, 0), 3.0f);
      comm.flush("end");
    } else {
      Rows got(100, 61, 4), three(1, 1, 0);
      for (size_t i = 0; i < all.size(); i++) {
        comm.recv("a", 0, Wire::BF16, got.block);
        check_rows(got, [&](int64_t r, int64_t c) { return bf16(all[i].at(r, c)); });
      }
      three.at(0, 0) = 3;
      comm.send("b", 0, Wire::F32, three.block);
    }
  }));
}

TEST(communicator_nans_and_zeros_are_carried) {
  no_errors(as_threads(SegmentFile(2).open(), [](Communicator& comm) {
    const float nan = std::bit_cast<float>(0xffc01234u), inf = std::bit_cast<float>(0x7f800000u);
    Rows x(1, 4, 0), out(1, 4, 0);
    const float mine[] = {-0.0f, comm.rank() ? 1.0f : nan, comm.rank() ? -inf : inf, 3e38f};
    std::copy(mine, mine + 4, x.block.data);
    for (Wire wire : {Wire::F32, Wire::BF16, Wire::F16}) {
      comm.all_reduce({"x", {0, 1}, wire}, x.block, out.block);
      CHECK(std::signbit(out.at(0, 0)) && out.at(0, 0) == 0);
      CHECK(std::isnan(out.at(0, 1)) && std::isnan(out.at(0, 2)));
      CHECK(std::isinf(out.at(0, 3)));
    }
  }));
}

TEST(communicator_a_deadline_names_who_did_not_come) {
  auto segment = SegmentFile(3).open();
  auto errors = as_threads(segment, [](Communicator& comm) {
    Rows x(1, 8, 0), out(1, 8, 0);
    if (comm.rank() < 2) comm.all_reduce({"layers.0.o_proj", {0, 1, 2}, Wire::F32}, x.block, out.block);
  }, 0.05);
  CHECK_EQUAL(errors[2], std::string());
  const std::string late = "nothing came from rank 2 in 0.05 s";
  for (int rank : {0, 1}) {
    CHECK(errors[size_t(rank)].starts_with("rank " + std::to_string(rank) + " at layers.0.o_proj: "));
    CHECK(errors[size_t(rank)].ends_with(late));
  }
  CHECK(segment->abort_reason().cause == late && segment->abort_reason().site == "layers.0.o_proj");
}

TEST(communicator_an_abort_ends_every_wait) {
  auto segment = SegmentFile(3).open();
  std::thread other([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    segment->abort({-1, "", "rank 2 was killed"});
    segment->abort({0, "", "too late"});
  });
  auto errors = as_threads(segment, [](Communicator& comm) {
    Rows x(50, 800, 0), out(50, 800, 0);
    if (comm.rank() == 0) comm.all_reduce({"a", {0, 1, 2}, Wire::F32}, x.block, out.block);
    if (comm.rank() == 1) comm.recv("b", 2, Wire::F32, out.block);
    if (comm.rank() == 2) CHECK(comm.segment().wait_posted(2, 0, 60) && comm.segment().aborted());
  });
  other.join();
  CHECK_EQUAL(errors[0], std::string("rank 0 at a: the group was aborted: rank 2 was killed"));
  CHECK_EQUAL(errors[1], std::string("rank 1 at b: the group was aborted: rank 2 was killed"));
  CHECK_EQUAL(errors[2], std::string());
  CHECK(segment->wait_completed(1, 60));  // whoever started the ranks does not wait either
  errors = as_threads(segment, [](Communicator& comm) { comm.send("c", (comm.rank() + 1) % 3, Wire::F32, Block{}); });
  for (auto& error : errors) CHECK(error.find("rank 2 was killed") != std::string::npos);  // the group stays aborted
}

TEST(communicator_a_killed_process_leaves_nobody_waiting) {
  const SegmentFile file(3);
  auto segment = file.open();
  std::thread watcher([&] {
    while (!segment->beats(1)) std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    segment->abort({-1, "", "rank 1 died"});
  });
  const auto statuses = as_processes(file, 3, [](Communicator& comm) {
    for (int step = 0;; step++) {
      if (comm.rank() == 1 && step == 20) {
        comm.segment().beat(1);
        raise(SIGKILL);
      }
      Rows x(30, 100, 0), out(30, 100, 0);
      comm.all_reduce({"x", {0, 1, 2}, Wire::F32}, x.block, out.block);
    }
  });
  watcher.join();
  CHECK(statuses == (std::vector{1, 128 + SIGKILL, 1}));
}

TEST(communicator_messages_of_an_earlier_epoch_are_dropped) {
  const SegmentFile file(2, 7);
  Rows old = random_rows(1, 0, 10, 33, 0), fresh = random_rows(2, 0, 4, 5, 0);
  {
    Communicator before(file.open(), 0);
    before.send("a", 1, Wire::F32, old.block);
    before.send("a", 1, Wire::BF16, old.block);
  }
  Segment::format(file.file, 2, test::kRing, 8);
  auto segment = file.open();
  Communicator sender(segment, 0), receiver(segment, 1);
  sender.send("a", 1, Wire::F32, fresh.block);
  Rows got(4, 5, 0);
  receiver.recv("a", 0, Wire::F32, got.block);
  check_rows(got, [&](int64_t r, int64_t c) { return fresh.at(r, c); });
  Segment::format(file.file, 2, test::kRing, 6);  // a rank that was left behind
  Communicator late(file.open(), 1);
  sender.send("a", 1, Wire::F32, fresh.block);
  CHECK_THROWS(CommunicatorError, late.recv("a", 0, Wire::F32, got.block), "rank 0 is of epoch 8; this rank is of epoch 6");
}

TEST(communicator_ranks_at_unlike_places_are_told_so) {
  auto both = [](std::function<void(Communicator&, Rows&, Rows&)> zero, std::function<void(Communicator&, Rows&, Rows&)> one) {
    auto errors = as_threads(SegmentFile(2).open(), [&](Communicator& comm) {
      Rows x(4, 6, 0), out(4, 6, 0);
      (comm.rank() ? one : zero)(comm, x, out);
    });
    return errors[0] + " | " + errors[1];
  };
  auto reduce = [](const char* site) {
    return [site](Communicator& comm, Rows& x, Rows& out) { comm.all_reduce({site, {0, 1}, Wire::F32}, x.block, out.block); };
  };
  CHECK(both(reduce("a"), reduce("b")).find("is at another collective") != std::string::npos);
  CHECK(both(reduce("a"), [](Communicator& comm, Rows& x, Rows& out) {
          comm.all_reduce({"a", {0, 1}, Wire::F32}, x.block.rows_of(0, 2), out.block.rows_of(0, 2));
        }).find("bytes; this rank needs") != std::string::npos);
  CHECK(both([](Communicator& comm, Rows& x, Rows& out) { comm.all_gather({"a", {0, 1}, Wire::F32}, x.block, out.block, false); },
             [](Communicator& comm, Rows& x, Rows& out) { comm.all_gather({"a", {0, 1}, Wire::F32}, x.block, out.block, false); })
            .find("bring 12 columns together; wanted 6") != std::string::npos);
  CHECK(both(reduce("a"), [](Communicator& comm, Rows& x, Rows& out) { comm.all_reduce({"a", {0, 2}, Wire::F32}, x.block, out.block); })
            .find("its group has rank 2 of 2") != std::string::npos);
}

TEST(communicator_garbage_on_a_channel_is_refused) {
  auto segment = SegmentFile(2).open();
  std::memset(segment->ring_data(0, 1), 0x5a, 256);
  segment->ring(0, 1).head.store(256);
  Communicator comm(segment, 1);
  Rows out(1, 1, 0);
  CHECK_THROWS(CommunicatorError, comm.recv("a", 0, Wire::F32, out.block), "rank 0 sends what is no message");
}

TEST(segment_refuses_what_is_none) {
  CHECK_THROWS(std::invalid_argument, Segment::bytes_for(0, 4096), "ranks=0 is outside 1..256");
  CHECK_THROWS(std::invalid_argument, Segment::bytes_for(2, 100), "a multiple of 64");
  const int file = memfd_create("none", MFD_CLOEXEC);
  CHECK_THROWS(std::invalid_argument, Segment{file}, "shared memory of 0 bytes");
  CHECK_EQUAL(ftruncate(file, 1 << 16), 0);
  CHECK_THROWS(std::invalid_argument, Segment{file}, "damaged, or of another version");
  close(file);
  CHECK_THROWS(std::invalid_argument, Communicator(SegmentFile(2).open(), 2), "rank=2 is outside 0..1");
}

TEST(segment_hands_steps_out_and_waits_for_them) {
  auto segment = SegmentFile(2).open();
  CHECK(!segment->wait_posted(0, 0, 0.01));
  CHECK(!segment->wait_completed(1, 0.01));
  std::vector<std::thread> ranks;
  for (int rank : {0, 1})
    ranks.emplace_back([&, rank] {
      for (uint64_t step = 0; step < 200; step++)
        if (segment->wait_posted(rank, step, 60)) segment->complete(rank, step + 1);
    });
  for (uint64_t step = 1; step <= 200; step++) {
    segment->post(step);
    CHECK(segment->wait_completed(step, 60));
  }
  for (auto& t : ranks) t.join();
}

}  // namespace
}  // namespace intaglio
