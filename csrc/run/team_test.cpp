// Unit tests of the thread team: each task runs once, phases run in order, exceptions reach the caller.
#include <atomic>
#include <vector>

#include "run/team.h"
#include "test/check.h"

namespace intaglio {
namespace {

// Counts how often each task of each part is run.
class Count : public Work {
 public:
  explicit Count(size_t tasks) : done_(tasks) {}
  void run(int, int64_t begin, int64_t end, Scratch&) override {
    for (int64_t i = begin; i < end; i++) done_[size_t(i)].fetch_add(1, std::memory_order_relaxed);
  }
  bool all(int times) const {
    for (const auto& n : done_)
      if (n.load(std::memory_order_relaxed) != times) return false;
    return true;
  }

 private:
  std::vector<std::atomic<int>> done_;
};

// Each task adds two values of one array into the other, in alternating directions; all values are equal, so they double.
class Doubling : public Work {
 public:
  explicit Doubling(size_t n) : from_(n, 1), to_(n, 0) {}
  void run(int part, int64_t begin, int64_t end, Scratch&) override {
    const size_t n = from_.size();
    auto &from = part % 2 ? to_ : from_, &to = part % 2 ? from_ : to_;
    for (int64_t i = begin; i < end; i++) to[size_t(i)] = from[(size_t(i) + n / 2) % n] + from[size_t(i)];
  }
  std::vector<int64_t> from_, to_;
};

TEST(every_task_runs_once_with_any_number_of_threads) {
  for (int threads : {1, 2, 3, 7}) {
    Team team(threads);
    for (int64_t tasks : {1, 2, 5, 64, 1000}) {
      Count work{size_t(tasks)};
      PhaseList list(threads, false);
      for (int64_t chunk : {1, 3, 100}) list.add(work, 0, 0, tasks, chunk);
      for (int i = 1; i <= 20; i++) {
        team.run(list);
        CHECK(work.all(3 * i));
      }
      team.wait_until_left(list);
    }
  }
}

// Throws at some tasks of some parts.
class Failing : public Work {
 public:
  void run(int part, int64_t begin, int64_t end, Scratch&) override {
    parts_.fetch_or(1u << part);
    if (part == fails && begin <= 3 && 3 < end) throw std::runtime_error("task 3");
  }
  int fails = 1;
  std::atomic<unsigned> parts_{0};
};

TEST(what_work_throws_ends_the_run_and_the_team_goes_on) {
  for (int threads : {1, 2, 4}) {
    Team team(threads);
    Failing work;
    PhaseList list(threads, false);
    for (int part = 0; part < 3; part++) list.add(work, 0, part, 20, 1);
    list.append(work, 0, 3, 5);
    for (int i = 0; i < 20; i++) {
      work.fails = i % 4, work.parts_ = 0;
      CHECK_THROWS(std::runtime_error, team.run(list), "task 3");
      CHECK_EQUAL(work.parts_.load(), (2u << work.fails) - 1);  // later parts are skipped
    }
    work.fails = -1, work.parts_ = 0;
    team.run(list);
    CHECK_EQUAL(work.parts_.load(), 15u);
    team.wait_until_left(list);
  }
}

TEST(a_phase_sees_the_results_of_the_previous_phase) {
  for (int threads : {1, 2, 4}) {
    Team team(threads);
    Doubling work(97);
    PhaseList list(threads, false);
    for (int part = 0; part < 10; part++) list.add(work, 0, part, 97, 2);
    team.run(list);
    for (int64_t v : work.from_) CHECK_EQUAL(v, 1024);
    team.run(list);
    for (int64_t v : work.from_) CHECK_EQUAL(v, 1024 * 1024);
    team.wait_until_left(list);
  }
}

TEST(a_tail_runs_in_order_after_its_phase_and_before_the_next) {
  struct Log : Work {
    std::vector<int> parts;
    void run(int part, int64_t, int64_t, Scratch&) override { parts.push_back(part); }
  } log;
  Team team(3);
  Count work(50);
  PhaseList list(3, false);
  CHECK(!list.append(log, 0, 9, 1));  // there is no previous phase
  list.add(work, 0, 0, 50, 1);
  for (int part = 1; part <= 3; part++) CHECK(list.append(log, 0, part, 1));
  list.add(work, 0, 0, 50, 1);
  CHECK(list.append(log, 0, 4, 1));
  CHECK_EQUAL(list.size(), size_t(2));
  for (int i = 0; i < 100; i++) team.run(list);
  team.wait_until_left(list);
  CHECK_EQUAL(log.parts.size(), size_t(400));
  for (size_t i = 0; i < log.parts.size(); i++) CHECK_EQUAL(log.parts[i], int(i % 4) + 1);
}

TEST(timed_phases_end_in_order_and_have_no_tail) {
  Team team(2);
  Count work(10);
  PhaseList list(2, true);
  for (int i = 0; i < 3; i++) list.add(work, i, 0, 10, 1);
  CHECK(!list.append(work, 3, 0, 1));
  team.run(list);
  team.wait_until_left(list);
  CHECK(list.finished(0) <= list.finished(1) && list.finished(1) <= list.finished(2));
}

TEST(an_empty_list_returns_at_once) {
  Team team(2);
  Count work(1);
  PhaseList list(2, false);
  list.add(work, 0, 0, 0, 1);
  CHECK_EQUAL(list.size(), size_t(0));
  team.run(list);
  team.wait_until_left(list);
}

// Lists are created and destroyed while threads may still be in earlier ones.
TEST(lists_can_be_destroyed_after_wait_until_left) {
  Team team(4);
  for (int round = 0; round < 300; round++) {
    Count work(7);
    PhaseList first(4, false), second(4, false);
    first.add(work, 0, 0, 7, 1);
    second.add(work, 0, 0, 7, 1), second.add(work, 0, 0, 7, 2);
    team.run(first), team.run(second), team.run(first);
    CHECK(work.all(4));
    team.wait_until_left(first), team.wait_until_left(second);
  }
}

// More threads than cores: some have not begun the last run when the team ends.
TEST(a_team_can_end_while_its_threads_lag_behind) {
  for (int round = 0; round < 300; round++) {
    Count work(3);
    PhaseList list(8, false);
    list.add(work, 0, 0, 3, 1);
    {
      Team team(8);
      for (int i = 0; i < round % 3; i++) team.run(list);
    }
    CHECK(work.all(round % 3));
  }
}

TEST(each_thread_has_its_own_scratch_which_holds_nothing_at_first) {
  struct Holding : Work {
    std::atomic<int> fresh{0};
    void run(int, int64_t, int64_t, Scratch& mine) override {
      if (mine.holds != this) mine.holds = this, fresh++;
      mine.floats[0] += 1;
    }
  } work;
  Team team(3);
  std::vector<float> memory(3 * 16);
  for (int i = 0; i < 3; i++) team.scratch(i).floats = &memory[size_t(i) * 16];
  PhaseList list(3, false);
  list.add(work, 0, 0, 30, 1);
  for (int i = 1; i <= 5; i++) {
    const int before = work.fresh;
    team.run(list);
    CHECK(work.fresh > before);
    float total = 0;
    for (int t = 0; t < 3; t++) total += memory[size_t(t) * 16];
    CHECK_EQUAL(total, float(30 * i));
  }
  team.wait_until_left(list);
}

}  // namespace
}  // namespace intaglio
