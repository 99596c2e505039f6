// Helpers for products with packed weights: memory for prepared rows, and one matrix of a stack.
#pragma once
#include "run/plan.h"

namespace intaglio {

// Lays out `rows` prepared rows of x for weight w in memory at `at`: sets *out and returns the bytes.
inline int64_t lay_rows(const Weight& w, bool x_bf16, int64_t rows, uint8_t* at, Rows* out) {
  const int64_t each = w.integer() ? 1 : x_bf16 && w.pairs() ? 2 : 4;
  const int64_t groups = w.integer() ? w.padded_k / w.group : 0, spans = w.integer() ? w.spans() : 0;
  const int64_t scales = aligned(rows * w.padded_k * each), starts = scales + aligned(rows * spans * 4);
  if (out) *out = {at, reinterpret_cast<float*>(at + scales), reinterpret_cast<int32_t*>(at + starts), rows, w.padded_k, groups};
  return starts + aligned(rows * groups * 4);
}
inline int64_t bytes_of_rows(const Weight& w, bool x_bf16, int64_t rows) { return lay_rows(w, x_bf16, rows, nullptr, nullptr); }

// Matrix i of a stack. Each matrix has `rows` rows (with glu, in each half) and occupies `units` whole units.
inline Weight matrix_of(const Weight& w, int64_t i, int64_t units, int64_t rows) {
  Weight own = w;
  own.n = w.glu ? 2 * rows : rows;
  own.panels = w.glu ? 2 * units : units;
  own.data = w.data + i * units * w.unit_bytes();
  return own;
}

}  // namespace intaglio
