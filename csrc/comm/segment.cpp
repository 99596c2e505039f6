// Segment, the shared memory of a group of ranks: its layout, bells (futex), abort word, step counters and heartbeats.
#include "comm/segment.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace intaglio {

static_assert(std::atomic<uint32_t>::is_always_lock_free && std::atomic<uint64_t>::is_always_lock_free);

void spin_pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

double steady_seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

namespace {
// Not the futex of std::atomic::wait, which other processes cannot wake.
void futex_wait(std::atomic<uint32_t>& word, uint32_t seen, double seconds) {
#if defined(__linux__)
  const timespec time{time_t(seconds), long((seconds - double(time_t(seconds))) * 1e9)};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, seen, &time, nullptr, 0);
#else
  if (word.load() == seen) std::this_thread::sleep_for(std::chrono::duration<double>(std::min(seconds, 50e-6)));
#endif
}

void futex_wake([[maybe_unused]] std::atomic<uint32_t>& word) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, 1 << 30, nullptr, nullptr, 0);
#endif
}

void copy_text(char* to, size_t room, const std::string& text) {
  const size_t n = std::min(room - 1, text.size());
  std::memcpy(to, text.data(), n);
  to[n] = 0;
}
}  // namespace

// Sequentially consistent, as is the news itself: either the sleeper sees the news before it sleeps, or the bell is rung.
void Bell::ring() {
  if (!sleeping.load()) return;
  rung.fetch_add(1);
  futex_wake(rung);
}

void Bell::sleep(uint32_t seen, double seconds) {
  futex_wait(rung, seen, std::min(seconds, kSleepSlice));
}

std::string AbortReason::text() const {
  return (rank < 0 ? "the group was aborted" : "rank " + std::to_string(rank) + " aborted the group") +
         (site.empty() ? "" : " at " + site) + ": " + cause;
}

int64_t Segment::bytes_for(int ranks, int64_t ring_bytes) {
  if (ranks < 1 || ranks > kMaxRanks) throw std::invalid_argument("ranks=" + std::to_string(ranks) + " is outside 1..256");
  if (ring_bytes < 4096 || ring_bytes % kAlign) throw std::invalid_argument("a ring has a multiple of 64 bytes, 4096 or more");
  return data_at(ranks) + int64_t(ranks) * ranks * ring_bytes;
}

void Segment::format(int file, int ranks, int64_t ring_bytes, uint64_t epoch) {
  Memory memory(file, bytes_for(ranks, ring_bytes), true);  // zeros: what every counter begins with
  auto header = reinterpret_cast<Header*>(memory.data());
  header->epoch = epoch, header->ring_bytes = ring_bytes, header->ranks = ranks, header->abort_rank = -1;
  header->magic = kMagic;
}

namespace {
int64_t size_of(int file) {
  struct stat facts;
  if (fstat(file, &facts)) throw std::system_error(errno, std::generic_category(), "a group's shared memory");
  return facts.st_size;
}
}  // namespace

Segment::Segment(int file) {
  const int64_t size = size_of(file);
  if (size < int64_t(sizeof(Header))) throw std::invalid_argument("a group's shared memory of " + std::to_string(size) + " bytes");
  memory_ = Memory(file, size, true);
  header_ = reinterpret_cast<Header*>(memory_.data());
  if (header_->magic != kMagic || bytes_for(header_->ranks, header_->ring_bytes) != size)
    throw std::invalid_argument("the group's shared memory is damaged, or of another version of Intaglio");
  ranks_ = header_->ranks, epoch_ = header_->epoch, ring_bytes_ = header_->ring_bytes;
  uint8_t* base = memory_.data();
  bells_ = reinterpret_cast<Bell*>(base + bells_at()), marks_ = reinterpret_cast<Mark*>(base + marks_at(ranks_));
  rings_ = reinterpret_cast<Ring*>(base + rings_at(ranks_)), data_ = base + data_at(ranks_);
}

void Segment::abort(const AbortReason& reason) {
  uint32_t none = 0;
  if (header_->aborted.compare_exchange_strong(none, 1)) {
    header_->abort_rank = reason.rank;
    copy_text(header_->site, sizeof header_->site, reason.site);
    copy_text(header_->cause, sizeof header_->cause, reason.cause);
    header_->aborted.store(2);
  }
  for (int i = 0; i <= ranks_; i++) bells_[i].rung.fetch_add(1), futex_wake(bells_[i].rung);
}

AbortReason Segment::abort_reason() const {
  if (!aborted()) throw std::logic_error("the group is not aborted");
  for (int i = 0; i < 1000000 && header_->aborted.load() != 2; i++) spin_pause();  // whoever writes it may die meanwhile
  if (header_->aborted.load() != 2) return {-1, "", "the reason is not known: whoever aborted it died"};
  return {header_->abort_rank, header_->site, header_->cause};
}

template <class Ready>
bool Segment::wait(int rank, Ready ready, double seconds) {
  Bell& bell = bells_[rank];
  const double until = steady_seconds() + seconds;
  for (int turn = 0;; turn++) {
    if (ready() || aborted()) return true;
    if (turn < kSpinTurns) {
      spin_pause();
      continue;
    }
    const double left = until - steady_seconds();
    if (left <= 0) return false;
    const uint32_t seen = bell.rung.load();
    bell.sleeping.store(1);
    if (!ready() && !aborted()) bell.sleep(seen, left);
    bell.sleeping.store(0);
  }
}

void Segment::post(uint64_t steps) {
  header_->posted.store(steps);
  for (int i = 0; i < ranks_; i++) bells_[i].ring();
}

void Segment::complete(int rank, uint64_t steps) {
  marks_[rank].completed.store(steps);
  bells_[ranks_].ring();
}

bool Segment::wait_posted(int rank, uint64_t steps, double seconds) {
  return wait(rank, [&] { return header_->posted.load() > steps; }, seconds);
}

bool Segment::wait_completed(uint64_t steps, double seconds) {
  auto all = [&] {
    for (int i = 0; i < ranks_; i++)
      if (marks_[i].completed.load() < steps) return false;
    return true;
  };
  return wait(ranks_, all, seconds);
}

}  // namespace intaglio
