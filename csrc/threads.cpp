#include "threads.h"

#include <algorithm>
#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace intaglio {

namespace {
constexpr int kSpins = 3000;  // about 50 us: longer than threads with balanced parts wait, shorter than a time slice

// Returns once ready(word) holds.
template <class Ready>
void wait_until(std::atomic<uint32_t>& word, Ready ready) {
  for (int i = 0; i < kSpins; i++) {
    if (ready(word.load(std::memory_order_acquire))) return;
#if defined(__x86_64__)
    _mm_pause();
#endif
  }
  for (uint32_t seen; !ready(seen = word.load(std::memory_order_acquire));) word.wait(seen, std::memory_order_acquire);
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
}  // namespace

Team::Team(int size, Work work) : size_(size), work_(std::move(work)), seats_(size_t(size)) {
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
  if (list.count == int64_t(list.phases.size())) list.phases.emplace_back();
  Phase& p = list.phases[size_t(list.count++)];
  p.op = op, p.part = part, p.ops = 1, p.tasks = tasks, p.chunk = size_ == 1 ? tasks : chunk;
  p.next.store(0, std::memory_order_relaxed);
  p.left.store(uint32_t(tasks), std::memory_order_relaxed);
}

void Team::add_or_join(int op, int64_t tasks, int64_t chunk) {
  List& list = lists_[turn_ & 1];
  Phase* last = list.count ? &list.phases[size_t(list.count - 1)] : nullptr;
  if (last && !list.timed && tasks == 1 && last->tasks == 1 && last->op >= 0 && last->part == 0 && last->op + last->ops == op)
    last->ops++;
  else
    add(op, 0, tasks, chunk);
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

void Team::walk(int thread, List& list) {
  for (int64_t i = 0; i < list.count; i++) {
    Phase& p = list.phases[size_t(i)];
    for (int64_t begin; (begin = p.next.fetch_add(p.chunk, std::memory_order_relaxed)) < p.tasks;) {
      int64_t end = std::min(p.tasks, begin + p.chunk);
      work_(thread, p, begin, end);
      uint32_t share = uint32_t(end - begin);
      if (p.left.fetch_sub(share, std::memory_order_acq_rel) == share) p.left.notify_all();
    }
    wait_until(p.left, [](uint32_t left) { return left == 0; });
    if (list.timed && thread == 0) p.finished = now();
  }
}

}  // namespace intaglio
