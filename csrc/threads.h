// A team of threads that works through phases of tasks together. A phase ends when its tasks are done, not when every
// thread has arrived: one that the system has put aside delays only the tasks it holds. Waiters spin briefly, then
// sleep, so that a second process on the machine does not stop the world.
#pragma once
#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <thread>
#include <vector>

namespace intaglio {

// Tasks 0..tasks-1, taken `chunk` at a time by whichever thread comes first. A lone task may do several ops in a row.
struct Phase {
  int op = 0, part = 0, ops = 1;
  int64_t tasks = 0, chunk = 1;
  double finished = 0;  // when the last task was done, if anybody asked
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<uint32_t> left{0};
};

class Team {
 public:
  using Work = std::function<void(int thread, const Phase& phase, int64_t begin, int64_t end)>;

  Team(int size, Work work);
  ~Team();
  Team(const Team&) = delete;
  int size() const { return size_; }
  // Forgets the phases of the run before last; add() then describes the next run.
  void clear(bool timed);
  void add(int op, int part, int64_t tasks, int64_t chunk);
  // The same for an op of one part: a lone task joins the lone task before it, unless each is to be timed.
  void add_or_join(int op, int64_t tasks, int64_t chunk);
  // Works through the phases in order; returns when all are done.
  void run();
  // The phases of the last run.
  int64_t count() const { return current().count; }
  const Phase& phase(int64_t i) const { return current().phases[size_t(i)]; }

 private:
  // Two lists, used in turn: a thread put aside during one run may still be walking its (finished) phases while the
  // next run is under way.
  struct List {
    std::deque<Phase> phases;  // grows, never moves what is in it
    int64_t count = 0;
    bool timed = false;
  };
  struct Seat {
    alignas(64) std::atomic<uint32_t> done{0};  // runs this thread has walked through
  };
  const List& current() const { return lists_[turn_ & 1]; }
  void walk(int thread, List& list);
  void worker(int thread);

  int size_;
  Work work_;
  List lists_[2];
  uint32_t turn_ = 0;
  bool stop_ = false;
  std::vector<Seat> seats_;
  alignas(64) std::atomic<uint32_t> started_{0};
  std::vector<std::thread> threads_;
};

}  // namespace intaglio
