// Measurement of read bandwidth and of the matrix kernels' FLOP/s.
#include "run/roofs.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <vector>

#include "pack/weight.h"
#include "run/team.h"

namespace intaglio {

namespace {

// Passes over `tasks` tasks per second by a team; the best of `runs` passes.
double best_rate(Team& team, Work& work, int runs, int64_t tasks) {
  PhaseList list(team.size(), false);
  list.add(work, -1, 0, tasks, std::max<int64_t>(1, tasks / (16 * team.size())));
  double best = 0;
  for (int i = 0; i < runs; i++) {
    auto start = std::chrono::steady_clock::now();
    team.run(list);
    std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = std::max(best, 1 / took.count());
  }
  team.wait_until_left(list);
  return best;
}

// Each task reads 64 KiB. A thread adds what it reads to its scratch, so that the compiler keeps the reads.
class ReadStream : public Work {
 public:
  static constexpr int64_t kFloatsRead = 16384;
  ReadStream(const Kernels& kernels, const Memory& memory)
      : kernels_(kernels), from_(reinterpret_cast<const float*>(memory.data())) {}
  void run(int, int64_t begin, int64_t end, Scratch& mine) override {
    for (int64_t i = begin; i < end; i++) mine.floats[0] += kernels_.read_stream(from_ + i * kFloatsRead, kFloatsRead);
  }

 private:
  const Kernels& kernels_;
  const float* from_;
};

// Each task multiplies kXRows rows by one panel; both stay in the thread's cache.
class PanelProduct : public Work {
 public:
  static constexpr int64_t kXRows = 96, kDepth = 1024;
  static constexpr int64_t kFloats = kXRows * kDepth * 2 + 2 * kXRows * kPanel;
  PanelProduct(const Kernels& kernels, const Format& format, int64_t group)
      : kernels_(kernels), weight_(format, kPanel, kDepth, group, false), group_(group) {}
  void run(int, int64_t begin, int64_t end, Scratch& mine) override {
    float *x = mine.floats, *tile = x + kXRows * kDepth * 2;
    const Rows rows{x, x + kXRows * kDepth, reinterpret_cast<int32_t*>(x + kXRows * kDepth + kXRows * 32), kXRows, kDepth,
                    group_ ? kDepth / group_ : 0};
    const LinearArgs a{&weight_.w, rows, true, tile + kXRows * kPanel, kPanel, nullptr, nullptr, 0, 1.0f, Act::None};
    for (int64_t i = begin; i < end; i++) kernels_.linear_units(a, 0, kXRows, 0, 1, tile);
  }

 private:
  const Kernels& kernels_;
  PackedWeight weight_;
  int64_t group_;
};

}  // namespace

double read_bandwidth(int threads, int megabytes, int runs, const Kernels& kernels) {
  Memory memory(int64_t(megabytes) << 20);
  std::memset(memory.data(), 1, size_t(memory.size()));
  ReadStream work(kernels, memory);
  std::vector<float> sums(size_t(threads) * 16);
  Team team(threads);
  for (int i = 0; i < threads; i++) team.scratch(i).floats = &sums[size_t(i) * 16];
  return double(memory.size()) * best_rate(team, work, runs, memory.size() / 4 / ReadStream::kFloatsRead);
}

double matrix_peak(int threads, const Format& format, int group, int runs, const Kernels& kernels) {
  constexpr int64_t repeats = 96;
  PanelProduct work(kernels, format, group);
  std::vector<Memory> memory;
  for (int i = 0; i < threads; i++) memory.emplace_back(PanelProduct::kFloats * 4);
  Team team(threads);
  for (int i = 0; i < threads; i++) team.scratch(i).floats = reinterpret_cast<float*>(memory[size_t(i)].data());
  const double flops = 2.0 * double(PanelProduct::kXRows * PanelProduct::kDepth * kPanel) * double(repeats);
  return flops * best_rate(team, work, runs, repeats);
}

}  // namespace intaglio
