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

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
}  // namespace

Team::Team(int size, Work work, Tail tail, Idle idle)
    : size_(size), work_(std::move(work)), tail_(std::move(tail)), idle_(std::move(idle)), seats_(size_t(size)) {
  for (int thread = 1; thread < size; thread++) threads_.emplace_back([this, thread] { worker(thread); });
}

Team::~Team() {
  stop_ = true;
  started_.store(turn_ + 1, std::memory_order_release);
  started_.notify_all();
  for (auto& t : threads_) t.join();
}

void Team::clear(bool timed) {
  turn_++;
  for (Seat& seat : seats_)
    if (&seat != seats_.data()) wait_until(seat.done, [&](uint32_t done) { return int32_t(done + 2 - turn_) >= 0; });
  lists_[turn_ & 1].count = 0;
  lists_[turn_ & 1].timed = timed;
}

void Team::add(int op, int part, int64_t tasks, int64_t chunk) {
  if (tasks == 0) return;
  List& list = lists_[turn_ & 1];
  if (list.count == int64_t(list.phases.size())) list.phases.emplace_back(size_);
  Phase& p = list.phases[size_t(list.count++)];
  p.op = op, p.part = part, p.tail = p.tail_end = 0, p.tasks = tasks, p.chunk = size_ == 1 ? tasks : chunk;
  for (int t = 0; t < size_; t++) p.next[size_t(t)].task.store(p.begin_of(t), std::memory_order_relaxed);
  p.left.store(uint32_t(tasks) + 1, std::memory_order_relaxed);  // the tail counts too
}

bool Team::append(int op) {
  List& list = lists_[turn_ & 1];
  if (!list.count || list.timed) return false;
  Phase& last = list.phases[size_t(list.count - 1)];
  if (last.tail == last.tail_end) last.tail = op;
  last.tail_end = op + 1;
  return true;
}

void Team::run() {
  if (size_ > 1) {
    started_.store(turn_, std::memory_order_release);
    started_.notify_all();
  }
  walk(0, lists_[turn_ & 1]);
}

void Team::worker(int thread) {
  for (uint32_t turn = 0;;) {
    wait_until(started_, [&](uint32_t started) { return started != turn; });
    if (stop_) return;
    turn = started_.load(std::memory_order_acquire);  // runs that ended without this thread are passed over
    walk(thread, lists_[turn & 1]);
    seats_[size_t(thread)].done.store(turn, std::memory_order_release);
    seats_[size_t(thread)].done.notify_all();
  }
}

// Does what is left of the range of thread `from`.
void Team::take(int thread, Phase& p, int from) {
  const int64_t stop = p.begin_of(from + 1);
  std::atomic<int64_t>& next = p.next[size_t(from)].task;
  for (int64_t begin; next.load(std::memory_order_relaxed) < stop && (begin = next.fetch_add(p.chunk, std::memory_order_relaxed)) < stop;) {
    const int64_t end = std::min(stop, begin + p.chunk);
    work_(thread, p, begin, end);
    const uint32_t share = uint32_t(end - begin);
    if (p.left.fetch_sub(share, std::memory_order_acq_rel) > share + 1) continue;
    for (int op = p.tail; op < p.tail_end; op++) tail_(thread, op);
    p.left.store(0, std::memory_order_release);
    p.left.notify_all();
  }
}

void Team::walk(int thread, List& list) {
  for (int64_t i = 0; i < list.count; i++) {
    Phase& p = list.phases[size_t(i)];
    for (int t = 0; t < size_; t++) take(thread, p, (thread + t) % size_);
    auto idle = [&](int turn) {
      if (i + 1 < list.count) idle_(thread, list.phases[size_t(i + 1)], turn);
    };
    wait_until(p.left, [](uint32_t left) { return left == 0; }, idle);
    if (list.timed && thread == 0) p.finished = now();
  }
}

}  // namespace intaglio
