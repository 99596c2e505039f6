// Segment: memory shared by the ranks of a group on one host and the process that started them. It has a ring from each
// rank to each other, a bell for each process to sleep on, the abort word, and counters of steps and heartbeats.
//
// A segment belongs to one epoch of the group: when a rank is replaced, the group gets a new segment, so nothing of the old
// one can be left in it.
#pragma once
#include <atomic>
#include <cstdint>
#include <string>

#include "comm/channel.h"
#include "run/memory.h"

namespace intaglio {

// What a process sleeps on. Whoever has news for it rings: that is a system call only if the process sleeps.
struct Bell {
  alignas(64) std::atomic<uint32_t> rung;
  std::atomic<uint32_t> sleeping;

  void ring();
  // Sleeps until it is rung after `seen` was read, or for so many seconds. May return early.
  void sleep(uint32_t seen, double seconds);
};

// Bytes from one rank to another: `head` counts those written, `tail` those read.
struct Ring {
  alignas(64) std::atomic<uint64_t> head;
  alignas(64) std::atomic<uint64_t> tail;
};

// Why a group was aborted. rank: who aborted it, -1 for the process that started the ranks.
struct AbortReason {
  int rank = -1;
  std::string site, cause;
  std::string text() const;
};

class Segment {
 public:
  static constexpr int kMaxRanks = 256;
  // Bytes of a segment for so many ranks, each ring of `ring_bytes`, a multiple of 64.
  static int64_t bytes_for(int ranks, int64_t ring_bytes);

  // Formats a file of zeros, whose length is bytes_for(), as a segment.
  static void format(int file, int ranks, int64_t ring_bytes, uint64_t epoch);
  // Maps a formatted file. Throws invalid_argument if it is none, or of another build.
  explicit Segment(int file);
  Segment(const Segment&) = delete;

  int ranks() const { return ranks_; }
  uint64_t epoch() const { return epoch_; }
  int64_t ring_bytes() const { return ring_bytes_; }
  Bell& bell(int rank) { return bells_[rank]; }  // rank == ranks(): the process that started them
  Ring& ring(int from, int to) { return rings_[from * ranks_ + to]; }
  uint8_t* ring_data(int from, int to) { return data_ + (int64_t(from) * ranks_ + to) * ring_bytes_; }

  // Sets the abort word, once: later reasons are dropped. Wakes every process.
  void abort(const AbortReason& reason);
  bool aborted() const { return header_->aborted.load(std::memory_order_acquire) != 0; }
  // Throws logic_error if the group is not aborted.
  AbortReason abort_reason() const;

  // The number of steps handed out so far, and how many of them each rank has completed.
  void post(uint64_t steps);
  void complete(int rank, uint64_t steps);
  uint64_t completed(int rank) const { return marks_[rank].completed.load(std::memory_order_acquire); }
  // Waits for more than `steps` posts, as `rank`. Returns false after so many seconds. Returns true at once if the group is
  // aborted.
  bool wait_posted(int rank, uint64_t steps, double seconds);
  // Waits until all ranks have completed so many steps; otherwise like wait_posted().
  bool wait_completed(uint64_t steps, double seconds);
  // A sign of life of a rank, counted up by a thread of its own.
  void beat(int rank) { marks_[rank].beats.fetch_add(1, std::memory_order_relaxed); }
  uint64_t beats(int rank) const { return marks_[rank].beats.load(std::memory_order_relaxed); }

 private:
  struct Header {
    uint64_t magic, epoch;
    int64_t ring_bytes;
    int32_t ranks, abort_rank;
    std::atomic<uint32_t> aborted;  // 1: the reason is being written; 2: it is there
    char site[160], cause[512];
    alignas(64) std::atomic<uint64_t> posted;
  };
  struct Mark {
    alignas(64) std::atomic<uint64_t> completed;
    std::atomic<uint64_t> beats;
  };
  static constexpr uint64_t kMagic = 0x31676c746e69;  // "intlg1"
  static int64_t bells_at() { return aligned(int64_t(sizeof(Header))); }
  static int64_t marks_at(int ranks) { return bells_at() + (ranks + 1) * int64_t(sizeof(Bell)); }
  static int64_t rings_at(int ranks) { return marks_at(ranks) + ranks * int64_t(sizeof(Mark)); }
  static int64_t data_at(int ranks) { return (rings_at(ranks) + int64_t(ranks) * ranks * int64_t(sizeof(Ring)) + 4095) / 4096 * 4096; }
  template <class Ready>
  bool wait(int rank, Ready ready, double seconds);

  Memory memory_;
  Header* header_;
  Bell* bells_;
  Mark* marks_;
  Ring* rings_;
  uint8_t* data_;
  int ranks_;
  uint64_t epoch_;
  int64_t ring_bytes_;
};

// Tells a processor that this thread spins.
void spin_pause();
double steady_seconds();
constexpr int kSpinTurns = 2000;  // before a wait sleeps: some 50 us, which is what a sleep and its wake-up take
constexpr double kSleepSlice = 0.004;  // seconds: no sleep is longer, so that an abort is seen whatever was lost

}  // namespace intaglio
