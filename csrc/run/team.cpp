// The thread team: how threads take tasks, steal tasks from each other, wait and sleep.
#include "run/team.h"

#include <algorithm>
#include <chrono>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace intaglio {

namespace {
constexpr int kSpins = 3000;  // about 50 us: longer than threads with balanced work wait, shorter than a time slice

// Waits until ready(word) is true and returns the word: spins kSpins times, calling idle(i) in each turn, then sleeps on it.
template <class Ready, class Idle>
uint32_t wait_until(std::atomic<uint32_t>& word, Ready ready, Idle idle) {
  uint32_t seen = word.load(std::memory_order_acquire);
  for (int i = 0; i < kSpins && !ready(seen); i++) {
    idle(i);
#if defined(__x86_64__)
    _mm_pause();
#endif
    seen = word.load(std::memory_order_acquire);
  }
  for (; !ready(seen); seen = word.load(std::memory_order_acquire)) word.wait(seen, std::memory_order_acquire);
  return seen;
}

template <class Ready>
uint32_t wait_until(std::atomic<uint32_t>& word, Ready ready) {
  return wait_until(word, ready, [](int) {});
}

// True if a wrapping counter has reached `wanted`.
bool reached(uint32_t number, uint32_t wanted) { return int32_t(number - wanted) >= 0; }

// Words of a gate: phase number in the high half, tasks in the low half.
uint64_t word(uint32_t number, int64_t tasks) { return uint64_t(number) << 32 | uint64_t(tasks); }
uint32_t number_of(uint64_t word) { return uint32_t(word >> 32); }
int64_t tasks_of(uint64_t word) { return int64_t(word & 0xffffffff); }

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
}  // namespace

void PhaseList::add(Work& work, int op, int part, int64_t tasks, int64_t chunk) {
  if (tasks) phases_.push_back({&work, op, part, threads_, tasks, threads_ == 1 ? tasks : chunk});
  if (timed_) finished_.resize(phases_.size());
}

bool PhaseList::append(Work& work, int op, int part, int64_t tasks) {
  if (phases_.empty() || timed_) return false;
  Phase& last = phases_.back();
  if (last.tail == last.tail_end) last.tail = tails_.size();
  tails_.push_back({&work, op, part, threads_, tasks, tasks});
  last.tail_end = tails_.size();
  return true;
}

Team::Team(int size) : size_(size), scratch_(size_t(size)), seats_(size_t(size)) {
  for (Gate& gate : gates_) gate.next = std::vector<Gate::Next>(size_t(size));
  for (int thread = 1; thread < size; thread++) threads_.emplace_back([this, thread] { worker(thread); });
}

Team::~Team() {
  stop_.store(true, std::memory_order_relaxed);
  started_.store(uint32_t(run_ + 1), std::memory_order_release);
  started_.notify_all();
  for (auto& t : threads_) t.join();
}

void Team::run(PhaseList& list) {
  if (list.phases_.empty()) return;
  for (Scratch& mine : scratch_) mine.holds = nullptr;
  list.last_ = ++run_;
  list.number_.store(number_, std::memory_order_release);
  number_ += uint32_t(list.phases_.size());
  if (size_ > 1) {
    list_.store(&list, std::memory_order_release);
    started_.store(uint32_t(run_), std::memory_order_release);
    started_.notify_all();
  }
  walk(0, list);
  if (skip_.load(std::memory_order_acquire)) {
    skip_.store(false), failed_.store(false);
    std::rethrow_exception(std::exchange(error_, nullptr));
  }
}

void Team::work(const Phase& p, int64_t begin, int64_t end, Scratch& mine) {
  if (skip_.load(std::memory_order_relaxed)) return;
  try {
    p.work->run(p.part, begin, end, mine);
  } catch (...) {
    if (failed_.exchange(true)) return;
    error_ = std::current_exception();
    skip_.store(true, std::memory_order_release);
  }
}

// A thread that has finished the list's last run does not use the list again: it next reads list_ when a later run starts.
void Team::wait_until_left(const PhaseList& list) {
  for (int thread = 1; thread < size_; thread++) {
    std::atomic<uint64_t>& done = seats_[size_t(thread)].done;
    for (uint64_t seen; (seen = done.load(std::memory_order_acquire)) < list.last_;) done.wait(seen, std::memory_order_acquire);
  }
}

void Team::worker(int thread) {
  for (uint64_t run = 0;;) {
    const uint32_t started = wait_until(started_, [&](uint32_t started) { return started != uint32_t(run); });
    if (stop_.load(std::memory_order_relaxed)) return;  // a thread that lags behind may see it before it sees started_ change
    run += uint32_t(started - uint32_t(run));           // skips runs that ended without this thread
    walk(thread, *list_.load(std::memory_order_acquire));
    seats_[size_t(thread)].done.store(run, std::memory_order_release);
    seats_[size_t(thread)].done.notify_all();
  }
}

// Takes and runs tasks of the range of thread `from` until none is left.
void Team::take(int thread, const PhaseList& list, const Phase& p, Gate& gate, uint32_t number, int from) {
  const int64_t start = p.begin_of(from), stop = p.begin_of(from + 1);
  std::atomic<uint64_t>& next = gate.next[size_t(from)].task;
  int64_t mine = 0;
  for (uint64_t seen = next.load(std::memory_order_relaxed); start < stop;) {
    if (number_of(seen) != number && reached(number_of(seen), number)) break;
    const int64_t begin = number_of(seen) == number ? tasks_of(seen) : start, end = std::min(stop, begin + p.chunk);
    if (begin >= stop) break;
    if (!next.compare_exchange_weak(seen, word(number, end), std::memory_order_relaxed)) continue;
    work(p, begin, end, scratch_[size_t(thread)]);
    mine += end - begin;
    seen = next.load(std::memory_order_relaxed);
  }
  if (mine) finish(thread, list, p, gate, number, mine);
}

// Counts `tasks` tasks as done. The thread that counts the last one runs the tail and ends the phase.
void Team::finish(int thread, const PhaseList& list, const Phase& p, Gate& gate, uint32_t number, int64_t tasks) {
  uint64_t seen = gate.done.load(std::memory_order_relaxed), now;
  do now = word(number, tasks + (number_of(seen) == number ? tasks_of(seen) : 0));
  while (!gate.done.compare_exchange_weak(seen, now, std::memory_order_acq_rel, std::memory_order_relaxed));
  if (tasks_of(now) < p.tasks) return;
  for (size_t i = p.tail; i < p.tail_end; i++) {
    const Phase& tail = list.tails_[i];
    work(tail, 0, tail.tasks, scratch_[size_t(thread)]);
  }
  for (int t = 0; p.tasks < size_ && t < size_; t++)  // empty ranges, whose words take() has not written
    if (p.begin_of(t) == p.begin_of(t + 1)) gate.next[size_t(t)].task.store(word(number, p.begin_of(t)), std::memory_order_relaxed);
  gate.over.store(number, std::memory_order_release);
  gate.over.notify_all();
}

void Team::walk(int thread, PhaseList& list) {
  uint32_t number = list.number_.load(std::memory_order_acquire);
  for (size_t i = 0; i < list.phases_.size(); i++, number++) {
    const Phase& p = list.phases_[i];
    Gate& gate = gates_[number % kGates];
    for (int t = 0; t < size_; t++) take(thread, list, p, gate, number, (thread + t) % size_);
    auto idle = [&](int turn) {
      if (i + 1 == list.phases_.size()) return;
      const Phase& next = list.phases_[i + 1];
      next.work->fetch_ahead(next.begin_of(thread), turn);
    };
    wait_until(gate.over, [&](uint32_t over) { return reached(over, number); }, idle);
    if (list.timed_ && thread == 0) list.finished_[i] = now();
  }
}

}  // namespace intaglio
