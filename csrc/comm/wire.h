// Wire formats (f32, bf16, f16) of values sent between ranks: encoding, decoding and rounding them; and functions that round, copy or
// divide a Block, the matrix in memory that a collective sends.
#pragma once
#include <algorithm>
#include <bit>
#include <cstring>

#include "comm/communicator.h"

namespace intaglio {

// Of their own, as those of isa/ are compiled for one instruction set. A NaN loses its payload, as in NumPy's bfloat16.
inline uint16_t to_bf16(float f) {
  const uint32_t u = std::bit_cast<uint32_t>(f), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return uint16_t((u & 0x7fffffff) > 0x7f800000 ? ((u >> 16) & 0x8000) | 0x7fc0 : rounded);
}
inline float from_bf16(uint16_t h) { return std::bit_cast<float>(uint32_t(h) << 16); }
inline uint16_t to_f16(float f) { return std::bit_cast<uint16_t>(_Float16(f)); }
inline float from_f16(uint16_t h) { return float(std::bit_cast<_Float16>(h)); }

inline void encode(Wire wire, const float* from, int64_t n, uint8_t* to) {
  auto half = reinterpret_cast<uint16_t*>(to);
  switch (wire) {
    case Wire::F32: std::memcpy(to, from, size_t(n) * 4); break;
    case Wire::BF16: for (int64_t i = 0; i < n; i++) half[i] = to_bf16(from[i]); break;
    case Wire::F16: for (int64_t i = 0; i < n; i++) half[i] = to_f16(from[i]); break;
  }
}

// Calls f(i, value i) for n values as they travelled.
template <class F>
void each(Wire wire, const uint8_t* from, int64_t n, F f) {
  auto half = reinterpret_cast<const uint16_t*>(from);
  auto whole = reinterpret_cast<const float*>(from);
  switch (wire) {
    case Wire::F32: for (int64_t i = 0; i < n; i++) f(i, whole[i]); break;
    case Wire::BF16: for (int64_t i = 0; i < n; i++) f(i, from_bf16(half[i])); break;
    case Wire::F16: for (int64_t i = 0; i < n; i++) f(i, from_f16(half[i])); break;
  }
}

inline float carried(Wire wire, float x) { return wire == Wire::F32 ? x : wire == Wire::BF16 ? from_bf16(to_bf16(x)) : from_f16(to_f16(x)); }

// Calls f(first value of a run, number of the run's first value counted from `first`, length) for runs that lie together.
// by_rows: no run is longer than a row.
template <class F>
void runs(const Block& b, int64_t first, int64_t n, F f, bool by_rows = false) {
  if (b.ld == b.cols && !by_rows) return f(b.data + first, int64_t(0), n);
  for (int64_t done = 0; done < n;) {
    const int64_t row = (first + done) / b.cols, column = (first + done) % b.cols, run = std::min(n - done, b.cols - column);
    f(b.data + row * b.ld + column, done, run);
    done += run;
  }
}

inline float* value_at(const Block& b, int64_t i) { return b.data + i / b.cols * b.ld + i % b.cols; }

inline void round_block(Wire wire, const Block& b, int64_t first, int64_t n) {
  if (wire == Wire::F32) return;
  runs(b, first, n, [&](float* p, int64_t, int64_t run) { for (int64_t i = 0; i < run; i++) p[i] = carried(wire, p[i]); });
}

// Of the rows of a tensor split among ranks as batch.py's shared_rows() does, the first of the i-th run.
inline int64_t share_begin(int64_t rows, int64_t i, int64_t ranks) { return (rows * i + ranks - 1) / ranks; }
inline Block share_of(const Block& b, int64_t i, int64_t ranks) {
  const int64_t first = share_begin(b.rows, i, ranks);
  return b.rows_of(first, share_begin(b.rows, i + 1, ranks) - first);
}

inline void copy(Wire wire, const Block& from, const Block& to) {
  for (int64_t r = 0; r < from.rows; r++)
    for (int64_t i = 0; i < from.cols; i++) to.data[r * to.ld + i] = carried(wire, from.data[r * from.ld + i]);
}

}  // namespace intaglio
