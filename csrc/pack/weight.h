// PackedWeight: a weight in the kernels' layout, with the memory that holds it.
#pragma once
#include <memory>

#include "pack/pack.h"
#include "run/memory.h"

namespace intaglio {

// A packed weight. Its memory may hold other weights too. Executables share packed weights.
struct PackedWeight {
  Weight w;
  std::shared_ptr<Memory> memory;

  PackedWeight(const Format& format, int64_t n, int64_t k, int64_t group, bool glu);
  int64_t bytes() const { return w.panels * w.panel_bytes; }
  // Pack rows first .. first + count - 1 with `threads` threads, from values or from codes. Throw invalid_argument for rows
  // outside the weight, and for a weight mapped from a file.
  void fill(const void* rows, Source type, int64_t first, int64_t count, int threads, const Kernels& kernels);
  void fill_codes(const CodedRows& rows, int64_t first, int64_t count, int threads);
  // Makes the weight refer to the image at byte `offset` of a region; frees its own memory. Copies nothing.
  void place(std::shared_ptr<Memory> region, int64_t offset);
  // Takes the image of another weight of the same shape and format, which keeps it too; not during a step. Whole pages of the
  // old image are given back to the system, unless other processes map them. Throws invalid_argument for another shape.
  void take(const PackedWeight& other);

 private:
  template <class Pack>
  void share(int64_t first, int64_t count, int threads, Pack pack);  // pack(begin panel, end panel) in parallel
};

}  // namespace intaglio
