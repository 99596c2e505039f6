#include "threads.h"

#include <algorithm>
#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace intaglio {

namespace {
constexpr int kSpins = 3000;  // about 50 us: longer than threads with balanced parts wait, shorter than a time slice

// Returns once ready(word) holds; idle(i) is called at each turn of the spinning part.
template <class Ready, class Idle>
void wait_until(std::atomic<uint32_t>& word, Ready ready, Idle idle) {
  for (int i = 0; i < kSpins; i++) {
    if (ready(word.load(std::memory_order_acquire))) return;
    idle(i);
#if defined(__x86_64__)
    _mm_pause();
#endif
  }
  for (uint32_t seen; !ready(seen = word.load(std::memory_order_acquire));) word.wait(seen, std::memory_order_acquire);
}

template <class Ready>
void wait_until(std::atomic<uint32_t>& word, Ready ready) {
  wait_until(word, ready, [](int) {});
}

// Whether a number that is counted up, and begins again after the largest, has come to `wanted`.
bool reached(uint32_t number, uint32_t wanted) { return int32_t(number - wanted) >= 0; }

// The words of a gate.
uint64_t word(uint32_t number, int64_t tasks) { return uint64_t(number) << 32 | uint64_t(tasks); }
uint32_t number_of(uint64_t word) { return uint32_t(word >> 32); }
int64_t tasks_of(uint64_t word) { return int64_t(word & 0xffffffff); }

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
}  // namespace

Team::Team(int size, Work work, Tail tail, Idle idle)
    : size_(size), work_(std::move(work)), tail_(std::move(tail)), idle_(std::move(idle)), seats_(size_t(size)) {
  for (Gate& gate : gates_) gate.next = std::vector<Gate::Next>(size_t(size));
  for (int thread = 1; thread < size; thread++) threads_.emplace_back([this, thread] { worker(thread); });
}

Team::~Team() {
  stop_ = true;
  started_.store(run_ + 1, std::memory_order_release);
  started_.notify_all();
  for (auto& t : threads_) t.join();
}

void Team::clear(bool timed) {
  which_ ^= 1;
  List& list = lists_[which_];
  for (Seat& seat : seats_)
    if (&seat != seats_.data()) wait_until(seat.done, [&](uint32_t done) { return reached(done, list.last); });
  list.phases.clear();
  list.timed = timed;
}

void Team::add(int op, int part, int64_t tasks, int64_t chunk) {
  if (tasks) lists_[which_].phases.push_back({op, part, size_, tasks, size_ == 1 ? tasks : chunk});
}

bool Team::append(int op) {
  List& list = lists_[which_];
  if (list.phases.empty() || list.timed) return false;
  Phase& last = list.phases.back();
  if (last.tail == last.tail_end) last.tail = op;
  last.tail_end = op + 1;
  return true;
}

void Team::run() {
  List& list = lists_[which_];
  if (list.timed) list.finished.resize(list.phases.size());
  run_ += int(run_ & 1) == which_ ? 2 : 1;
  list.last = run_;
  list.number.store(number_, std::memory_order_release);
  number_ += uint32_t(list.phases.size());
  if (size_ > 1) {
    started_.store(run_, std::memory_order_release);
    started_.notify_all();
  }
  walk(0, list);
}

void Team::worker(int thread) {
  for (uint32_t run = 0;;) {
    wait_until(started_, [&](uint32_t started) { return started != run; });
    if (stop_) return;
    run = started_.load(std::memory_order_acquire);  // runs that ended without this thread are passed over
    walk(thread, lists_[run & 1]);
    seats_[size_t(thread)].done.store(run, std::memory_order_release);
    seats_[size_t(thread)].done.notify_all();
  }
}

// Does what is left of the range of thread `from`.
void Team::take(int thread, const Phase& p, Gate& gate, uint32_t number, int from) {
  const int64_t start = p.begin_of(from), stop = p.begin_of(from + 1);
  std::atomic<uint64_t>& next = gate.next[size_t(from)].task;
  int64_t mine = 0;
  for (uint64_t seen = next.load(std::memory_order_relaxed); start < stop;) {
    if (number_of(seen) != number && reached(number_of(seen), number)) break;
    const int64_t begin = number_of(seen) == number ? tasks_of(seen) : start, end = std::min(stop, begin + p.chunk);
    if (begin >= stop) break;
    if (!next.compare_exchange_weak(seen, word(number, end), std::memory_order_relaxed)) continue;
    work_(thread, p, begin, end);
    mine += end - begin;
    seen = next.load(std::memory_order_relaxed);
  }
  if (mine) finish(thread, p, gate, number, mine);
}

// Counts tasks as done; whoever counts the last does the tail and ends the phase.
void Team::finish(int thread, const Phase& p, Gate& gate, uint32_t number, int64_t tasks) {
  uint64_t seen = gate.done.load(std::memory_order_relaxed), now;
  do now = word(number, tasks + (number_of(seen) == number ? tasks_of(seen) : 0));
  while (!gate.done.compare_exchange_weak(seen, now, std::memory_order_acq_rel, std::memory_order_relaxed));
  if (tasks_of(now) < p.tasks) return;
  for (int op = p.tail; op < p.tail_end; op++) tail_(thread, op);
  for (int t = 0; p.tasks < size_ && t < size_; t++)  // ranges without a task, which nobody has marked
    if (p.begin_of(t) == p.begin_of(t + 1)) gate.next[size_t(t)].task.store(word(number, p.begin_of(t)), std::memory_order_relaxed);
  gate.over.store(number, std::memory_order_release);
  gate.over.notify_all();
}

void Team::walk(int thread, List& list) {
  uint32_t number = list.number.load(std::memory_order_acquire);
  for (size_t i = 0; i < list.phases.size(); i++, number++) {
    const Phase& p = list.phases[i];
    Gate& gate = gates_[number % kGates];
    for (int t = 0; t < size_; t++) take(thread, p, gate, number, (thread + t) % size_);
    auto idle = [&](int turn) {
      if (i + 1 < list.phases.size()) idle_(thread, list.phases[i + 1], turn);
    };
    wait_until(gate.over, [&](uint32_t over) { return reached(over, number); }, idle);
    if (list.timed && thread == 0) list.finished[i] = now();
  }
}

}  // namespace intaglio
