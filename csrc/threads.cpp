#include "threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace intaglio {

namespace {
constexpr int kSpins = 3000;  // about 50 us: longer than a barrier between balanced parts, shorter than a time slice

void wait_until_changed(std::atomic<uint32_t>& word, uint32_t from) {
  for (int i = 0; i < kSpins; i++) {
    if (word.load(std::memory_order_acquire) != from) return;
#if defined(__x86_64__)
    _mm_pause();
#endif
  }
  while (word.load(std::memory_order_acquire) == from) word.wait(from, std::memory_order_acquire);
}
}  // namespace

Team::Team(int size) : size_(size) {
  for (int id = 1; id < size; id++) threads_.emplace_back([this, id] { worker(id); });
}

Team::~Team() {
  stop_ = true;
  started_.fetch_add(1, std::memory_order_release);
  started_.notify_all();
  for (auto& t : threads_) t.join();
}

void Team::worker(int id) {
  for (uint32_t seen = 0;;) {
    wait_until_changed(started_, seen);
    seen++;
    if (stop_) return;
    (*work_)(id);
    barrier();
  }
}

void Team::run(const std::function<void(int)>& f) {
  if (size_ == 1) return f(0);
  work_ = &f;
  started_.fetch_add(1, std::memory_order_release);
  started_.notify_all();
  f(0);
  barrier();
}

void Team::barrier() {
  if (size_ == 1) return;
  uint32_t now = passed_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    passed_.fetch_add(1, std::memory_order_release);
    passed_.notify_all();
  } else {
    wait_until_changed(passed_, now);
  }
}

}  // namespace intaglio
