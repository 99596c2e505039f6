// Helpers of the ops that multiply rows of x by packed weights (linear, head_linear, experts): buffers for rows that are
// rounded to the format of the product (with their scales), and the view of one matrix of a stack, such as one expert's.
#pragma once
#include "run/plan.h"

namespace intaglio {

// Lays out a buffer at `at` for `rows` rows of x, rounded for a product with weight w: sets *out (if not null) to its parts
// and returns its size in bytes.
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
