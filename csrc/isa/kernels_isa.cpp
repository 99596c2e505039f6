// All kernels for one instruction set. Compiled once for each, with its compiler flags and -DISA=its namespace.
#include <algorithm>
#include <type_traits>

#include "isa/kernels.h"
#include "isa/simd.h"

namespace intaglio::ISA {

#include "linear.inl"
#include "amx.inl"
#include "rows.inl"
#include "attention.inl"
#include "amx_attention.inl"
#include "pooled.inl"
#include "experts.inl"
#include "scales.inl"
#include "recurrent.inl"

float read_stream(const float* p, int64_t n) {
  F a[8];
  for (F& x : a) x = set(0);
  for (int64_t i = 0; i + 8 * F::N <= n; i += 8 * F::N) {
    if (kIntel) fetch_far((const uint8_t*)(p + i), 8 * F::N * 4);
    for (int j = 0; j < 8; j++) a[j] = a[j] + load(p + i + j * F::N);
  }
  for (int j = 1; j < 8; j++) a[0] = a[0] + a[j];
  return sum(a[0]);
}

#define NAME_OF(x) #x
#define NAME(x) NAME_OF(x)
constexpr Kernels kTable = {NAME(ISA), prepare_row, linear_units, norm_row, moment, map_row,
                            attend_split, attend_merge, score_keys, attend_list, pool_rows, route_row, combine_row, largest_logit, weigh, read_stream, scales::choose_scale,
                            scales::choose_lines, conv_row, decay_row, attend_state, scan_channels, lru_channels};

}  // namespace intaglio::ISA

namespace intaglio {
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
const Kernels* JOIN(kernels_, ISA)() { return &ISA::kTable; }
}  // namespace intaglio
