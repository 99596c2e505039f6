// Team: a thread pool that runs phases of tasks, one phase after the other. A phase ends when all its tasks are done; it
// does not wait for every thread, so a thread that the system has preempted delays only the tasks it has taken. Waiting
// threads spin for about 50 us and then sleep, so that they leave the cores to other processes.
#pragma once
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace intaglio {

// Scratch memory of one thread; the plan determines its size.
struct alignas(64) Scratch {
  float* floats = nullptr;
  uint8_t* rows = nullptr;      // rows of x that this thread rounded for its own use
  const void* holds = nullptr;  // the Work whose x is in `rows`; null at the start of a run
};

// The code of a phase's tasks.
class Work {
 public:
  virtual ~Work() = default;
  // Does tasks begin .. end - 1 of phase `part`. Called concurrently by several threads, each with other tasks.
  virtual void run(int part, int64_t begin, int64_t end, Scratch& mine) = 0;
  // Prefetches while a thread waits for the end of the previous phase. `first`: first task of the thread's range in this
  // phase. Called repeatedly, with turn = 0, 1, 2, ... May read weights, but nothing that a step writes.
  virtual void fetch_ahead(int64_t /*first*/, int64_t /*turn*/) const {}
  virtual bool fetches() const { return false; }  // true if fetch_ahead() does something
};

// Tasks 0 .. tasks - 1. Each thread has a contiguous range of them, so that it reads one stream of memory. It takes `chunk`
// tasks at a time, and when its range is empty it steals from the others'. The thread that finishes the last task runs
// the phase's tail (small works appended to it) alone and in order; then the phase ends.
struct Phase {
  Work* work;
  int op, part, threads;  // op: the op as whose time the phase counts, or -1
  int64_t tasks, chunk;
  size_t tail = 0, tail_end = 0;  // range of the list's tails_
  int64_t begin_of(int thread) const { return tasks * thread / threads; }
};

// A sequence of phases, built once and run any number of times. It does not change after its first run.
class PhaseList {
 public:
  PhaseList(int threads, bool timed) : threads_(threads), timed_(timed) {}
  void add(Work& work, int op, int part, int64_t tasks, int64_t chunk);
  // Adds work that is too small for a phase to the tail of the previous phase. Returns false if there is no phase, or if
  // the list is timed (then each work needs its own phase).
  bool append(Work& work, int op, int part, int64_t tasks);
  size_t size() const { return phases_.size(); }
  const Phase& operator[](size_t i) const { return phases_[i]; }
  // Of a timed list: when phase i ended in the last run, in seconds of a steady clock.
  double finished(size_t i) const { return finished_[i]; }

 private:
  friend class Team;
  int threads_;
  bool timed_;
  std::vector<Phase> phases_, tails_;
  std::vector<double> finished_;
  uint64_t last_ = 0;                // number of its last run
  std::atomic<uint32_t> number_{0};  // number of that run's first phase; the team numbers phases through all runs
};

class Team {
 public:
  explicit Team(int size);
  ~Team();
  Team(const Team&) = delete;
  int size() const { return size_; }
  Scratch& scratch(int thread) { return scratch_[size_t(thread)]; }
  // Runs all phases in order, with the calling thread as thread 0; returns when all have ended. If work throws, the rest is
  // skipped and the first exception rethrown.
  void run(PhaseList& list);
  // Returns when no thread uses the list any more, which may then be destroyed. (A preempted thread may still be going
  // through the ended phases of an earlier run while later runs are in progress.)
  void wait_until_left(const PhaseList& list);

 private:
  // Progress of a phase. A few gates are used in turn, so that they stay in cache however much memory a phase reads. Each
  // word holds the number of the phase to which it belongs: an older number means that this phase has not begun there, a
  // newer one tells a thread that was preempted that its phase has ended. All words of a gate are written each time it is
  // used, so numbers in it are never far apart, and a signed difference orders them even after the counter wraps.
  struct Gate {
    struct Next {
      alignas(64) std::atomic<uint64_t> task{0};  // (phase number, first task of the thread's range not yet taken)
    };
    std::vector<Next> next;
    alignas(64) std::atomic<uint64_t> done{0};  // (phase number, tasks done)
    alignas(64) std::atomic<uint32_t> over{0};  // number of the last phase that ended
  };
  static constexpr uint32_t kGates = 4;
  struct Seat {
    alignas(64) std::atomic<uint64_t> done{0};  // number of the last run that this thread has finished
  };
  void walk(int thread, PhaseList& list);
  void take(int thread, const PhaseList& list, const Phase& p, Gate& gate, uint32_t number, int from);
  void work(const Phase& p, int64_t begin, int64_t end, Scratch& mine);
  void finish(int thread, const PhaseList& list, const Phase& p, Gate& gate, uint32_t number, int64_t tasks);
  void worker(int thread);

  int size_;
  Gate gates_[kGates];
  uint64_t run_ = 0;     // number of the last run
  uint32_t number_ = 1;  // number of the next phase
  std::atomic<bool> stop_{false};
  std::atomic<bool> failed_{false}, skip_{false};  // some work has thrown; and its exception is there
  std::exception_ptr error_;
  std::vector<Scratch> scratch_;
  std::vector<Seat> seats_;
  std::atomic<PhaseList*> list_{nullptr};         // of the last run; written before started_
  alignas(64) std::atomic<uint32_t> started_{0};  // low 32 bits of run_; idle threads sleep on it
  std::vector<std::thread> threads_;
};

}  // namespace intaglio
