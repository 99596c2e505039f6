// Lookups in a step's inputs: the sequence of a token row, and the K/V cache blocks of a sequence.
#pragma once
#include <algorithm>

#include "run/tensor.h"

namespace intaglio {

// The sequence of a token row.
inline int64_t sequence_of(const StepInputs& in, int64_t row) {
  return std::upper_bound(in.first_row, in.first_row + in.s, int32_t(row)) - in.first_row - 1;
}

// The blocks of a sequence in a cache.
inline const int32_t* blocks_of(const StepInputs& in, const Cache& c, int64_t sequence) {
  return (c.windowed ? in.window_table : in.block_table) + sequence * in.table_width;
}

}  // namespace intaglio
