// A team of threads that works through phases of tasks together. A phase ends when its tasks are done, not when every
// thread has arrived: one that the system has put aside delays only the tasks it holds. Waiters spin briefly, then
// sleep, so that a second process on the machine does not stop the world.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace intaglio {

// Tasks 0..tasks-1, of which each thread has a range of its own, so that it reads one stream of memory; it takes `chunk`
// at a time, and from the others' ranges when its own is empty. Whoever finishes the last task goes on alone with the
// ops of the tail, in order, before the phase is over. Only a description: what is left of it is the gate's to know.
struct Phase {
  int op, part, threads;
  int64_t tasks, chunk;
  int tail = 0, tail_end = 0;
  int64_t begin_of(int thread) const { return tasks * thread / threads; }
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
  // Begins another list of phases, which add() then describes, and forgets the list before last.
  void clear(bool timed);
  void add(int op, int part, int64_t tasks, int64_t chunk);
  // An op that is not worth a phase: joins the tail of the phase before it. False if there is none, or each is timed.
  bool append(int op);
  // Works through the phases in order; returns when all are done. The same list may be run again and again.
  void run();
  int64_t count() const { return int64_t(current().phases.size()); }
  const Phase& phase(int64_t i) const { return current().phases[size_t(i)]; }
  // When the last task of a phase was done in the last run of a timed list.
  double finished(int64_t i) const { return current().finished[size_t(i)]; }

 private:
  // Two lists, used in turn: a thread put aside during one run may still be walking its (finished) phases while runs of
  // the other list are under way.
  struct List {
    std::vector<Phase> phases;
    std::vector<double> finished;
    bool timed = false;
    uint32_t last = 0;                // its last run
    std::atomic<uint32_t> number{0};  // of the first phase of that run, counted from the team's first
  };
  // What is done of a phase. Phases are numbered through all runs, and there are a few gates used in turn, so that they
  // stay in cache however much memory a phase reads. Each word carries the number of the phase that it speaks of:
  // an older number means that nothing of this phase is done, and a thread put aside sees by a newer one that its
  // phase is over. No word is left out for a whole round, so a difference of numbers tells which is older.
  struct Gate {
    struct Next {
      alignas(64) std::atomic<uint64_t> task{0};  // number, first task of the thread's range that nobody has taken
    };
    std::vector<Next> next;
    alignas(64) std::atomic<uint64_t> done{0};  // number, tasks
    alignas(64) std::atomic<uint32_t> over{0};  // number of the last phase that was over
  };
  static constexpr uint32_t kGates = 4;
  struct Seat {
    alignas(64) std::atomic<uint32_t> done{0};  // runs this thread has walked through
  };
  const List& current() const { return lists_[which_]; }
  void walk(int thread, List& list);
  void take(int thread, const Phase& p, Gate& gate, uint32_t number, int from);
  void finish(int thread, const Phase& p, Gate& gate, uint32_t number, int64_t tasks);
  void worker(int thread);

  int size_;
  Work work_;
  Tail tail_;
  Idle idle_;
  List lists_[2];
  Gate gates_[kGates];
  int which_ = 0;
  uint32_t run_ = 0;     // the last run; its lowest bit is its list
  uint32_t number_ = 1;  // of the next phase
  bool stop_ = false;
  std::vector<Seat> seats_;
  alignas(64) std::atomic<uint32_t> started_{0};
  std::vector<std::thread> threads_;
};

}  // namespace intaglio
