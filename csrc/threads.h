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

// Tasks 0..tasks-1, of which each thread has a range of its own, so that it reads one stream of memory; it takes `chunk`
// at a time, and from the others' ranges when its own is empty. Whoever finishes the last task goes on alone with the
// ops of the tail, in order, before the phase is over.
struct Phase {
  explicit Phase(int threads) : next(size_t(threads)) {}
  int64_t begin_of(int thread) const { return tasks * thread / int64_t(next.size()); }

  struct Next {
    alignas(64) std::atomic<int64_t> task{0};
  };
  int op = 0, part = 0, tail = 0, tail_end = 0;
  int64_t tasks = 0, chunk = 1;
  double finished = 0;  // when the last task was done, if anybody asked
  std::vector<Next> next;
  alignas(64) std::atomic<uint32_t> left{0};
};

class Team {
 public:
  using Work = std::function<void(int thread, const Phase& phase, int64_t begin, int64_t end)>;
  using Tail = std::function<void(int thread, int op)>;
  // What a thread may do about a coming phase while it waits: called again and again with turn = 0, 1, 2, ...
  using Idle = std::function<void(int thread, const Phase& coming, int64_t turn)>;

  Team(int size, Work work, Tail tail = {}, Idle idle = [](int, const Phase&, int64_t) {});
  ~Team();
  Team(const Team&) = delete;
  int size() const { return size_; }
  // Forgets the phases of the run before last; add() then describes the next run.
  void clear(bool timed);
  void add(int op, int part, int64_t tasks, int64_t chunk);
  // An op that is not worth a phase: joins the tail of the phase before it. False if there is none, or each is timed.
  bool append(int op);
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
  void take(int thread, Phase& p, int from);
  void worker(int thread);

  int size_;
  Work work_;
  Tail tail_;
  Idle idle_;
  List lists_[2];
  uint32_t turn_ = 0;
  bool stop_ = false;
  std::vector<Seat> seats_;
  alignas(64) std::atomic<uint32_t> started_{0};
  std::vector<std::thread> threads_;
};

}  // namespace intaglio
