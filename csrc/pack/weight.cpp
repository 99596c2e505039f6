// PackedWeight: computes its layout, packs rows or codes with several threads, and moves to a shared region of memory.
#include "pack/weight.h"

#include <stdexcept>
#include <thread>
#include <vector>

namespace intaglio {

Weight weight_layout(const Format& format, int64_t n, int64_t k, int64_t group, bool glu) {
  const Fmt fmt = format.fmt;
  const bool coded = fmt >= Fmt::I8;
  const int64_t block = groups_of_block(fmt);
  if (n < 1 || k < 1 || (glu && n % 2)) throw std::invalid_argument("a weight needs at least one row and column, and with glu an even number of rows");
  if (block > 1 && (group * block != kBlock || k % kBlock))
    throw std::invalid_argument("q4_k, q5_k and q6_k need rows of a multiple of 256 values, in groups of 32, 32 and 16");
  if (fmt == Fmt::NV4 && group != 16) throw std::invalid_argument("group=" + std::to_string(group) + "; nvfp4 has groups of 16");
  if (coded && block == 1 && fmt != Fmt::NV4 && (group < 32 || group > kMaxGroup || group % 32))
    throw std::invalid_argument("group=" + std::to_string(group) + "; it must be a multiple of 32 from 32 to 1024");
  Weight w{fmt, format.scale, n, k, coded ? group : 0, glu, format.row, 0, 0, 0, nullptr};
  const int64_t align = coded ? group : fmt == Fmt::BF16 ? 2 : 1;
  w.padded_k = (k + align - 1) / align * align;
  w.panels = (w.half() + kPanel - 1) / kPanel * (glu ? 2 : 1);
  w.panel_bytes = w.factor_bytes() + (coded ? w.padded_k / (group * block) * w.block_bytes() : w.padded_k * kPanel * (fmt == Fmt::F32 ? 4 : 2));
  return w;
}

PackedWeight::PackedWeight(const Format& format, int64_t n, int64_t k, int64_t group, bool glu)
    : w(weight_layout(format, n, k, group, glu)), memory(std::make_shared<Memory>(bytes())) {
  w.data = memory->data();
}

// Calls pack(begin panel, end panel) on `threads` threads, each with its own range of panels.
template <class Pack>
void PackedWeight::share(int64_t first, int64_t count, int threads, Pack pack) {
  if (first < 0 || count < 0 || first + count > w.n) throw std::invalid_argument("rows outside the weight");
  if (!memory->writable()) throw std::invalid_argument("a weight mapped from a file is read-only");
  if (!count) return;
  const int64_t begin = w.glu ? 0 : w.panel_of(first), panels = (w.glu ? w.panels : w.panel_of(first + count - 1) + 1) - begin;
  std::vector<std::thread> helpers;
  auto part = [&](int i) { pack(begin + panels * i / threads, begin + panels * (i + 1) / threads); };
  for (int i = 1; i < threads; i++) helpers.emplace_back(part, i);
  part(0);
  for (auto& t : helpers) t.join();
}

void PackedWeight::fill(const void* rows, Source type, int64_t first, int64_t count, int threads, const Kernels& kernels) {
  share(first, count, threads, [&](int64_t begin, int64_t end) { pack_rows(w, rows, type, first, count, begin, end, kernels); });
}

void PackedWeight::fill_codes(const CodedRows& rows, int64_t first, int64_t count, int threads) {
  share(first, count, threads, [&](int64_t begin, int64_t end) { pack_coded(w, rows, first, count, begin, end); });
}

void PackedWeight::take(const PackedWeight& other) {
  const Weight &a = w, &b = other.w;
  if (a.fmt != b.fmt || a.n != b.n || a.k != b.k || a.group != b.group || a.glu != b.glu)
    throw std::invalid_argument("the other weight has another shape or format");
  if (a.data != b.data) memory->drop(a.data - memory->data(), bytes());
  w = other.w, memory = other.memory;
}

void PackedWeight::place(std::shared_ptr<Memory> region, int64_t offset) {
  if (offset < 0 || offset % kAlign || offset + bytes() > region->size()) throw std::invalid_argument("the weight's offset is not a multiple of 64, or the weight does not fit its region");
  memory = std::move(region);
  w.data = memory->data() + offset;
}

}  // namespace intaglio
