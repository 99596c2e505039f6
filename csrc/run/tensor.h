// Operands of native ops: tensors (buffer columns, vectors, packed weights, K/V caches, recurrent state), and a step's inputs.
#pragma once
#include <memory>
#include <vector>

#include "isa/kernels.h"
#include "pack/weight.h"
#include "run/memory.h"

namespace intaglio {

// Number of rows of a buffer in a step: the r rows to sample, or run number `share` of the t tokens cut into `shares`
// near-equal runs.
struct Extent {
  bool sampled;
  int64_t share, shares;
  int64_t of(int64_t t, int64_t r) const { return sampled ? r : up_to(share + 1, t) - up_to(share, t); }
  int64_t up_to(int64_t i, int64_t t) const { return (t * i + shares - 1) / shares; }
};

// Memory for rows of 4-byte values; `rows` and `data` are set for each step.
struct Buffer {
  int64_t row_bytes;
  Extent extent;
  int64_t rows = 0;
  uint8_t* data = nullptr;
};

constexpr int kPageMultiple = 16;  // a page's tokens are a multiple of it, so that they fill whole vectors of any instruction set

// The K or the V cache of a layer. V: [pages][heads][page][stride], stride >= head_dim. K: [pages][heads][head_dim][page],
// stride = page.
struct Cache {
  Memory memory;
  Fmt format;
  int heads, head_dim, stride;
  bool keys;      // laid out as [head_dim][page]
  bool windowed;  // its blocks are those of the batch's window_table
  int rows;       // rows of a page: its tokens, or fewer if a row is pooled from several tokens ([head_dim][rows] of keys)

  // Bytes of a head's block in a page, and of a page.
  int64_t head_bytes() const { return block_bytes(format, keys ? head_dim : stride, rows); }
  int64_t page_bytes() const { return heads * head_bytes(); }
};

// Recurrent state: `stride` floats for each of some slots. A step reads slot state_from[s] of a sequence and writes slot
// state_to[s], so a step that fails has changed nothing that is read again.
struct States {
  Memory memory;
  int64_t stride;
  float* slot(int64_t i) const { return reinterpret_cast<float*>(memory.data()) + i * stride; }
};

struct Tensor {  // exactly one of: a range of a buffer's columns, a vector, a weight, a cache, recurrent state
  Buffer* buffer = nullptr;
  int64_t cols = 0, ld = 0, column = 0;
  std::vector<float> vector;
  std::shared_ptr<PackedWeight> weight;
  std::vector<int64_t> shape;  // of a weight, as the Program declares it
  std::unique_ptr<Cache> cache;
  std::unique_ptr<States> states;

  int64_t rows() const { return buffer->rows; }
  float* row(int64_t i) const { return reinterpret_cast<float*>(buffer->data) + column + i * ld; }
  int32_t* integers(int64_t i) const { return reinterpret_cast<int32_t*>(row(i)); }
};

// Sampling parameters of one row of logits; the algorithm is defined in ops/sample.py.
struct RowSampling {
  float temperature, top_p, min_p;
  int32_t top_k;
  uint64_t seed;
  int64_t position;
  // Logits are first edited: logit l at ids[i] becomes (l > 0 ? l / scale[i] : l * scale[i]) + add[i]. Then those whose bit
  // in the grammar mask is 0 become -inf.
  int64_t edits = 0;
  const int32_t* ids = nullptr;
  const float *scale = nullptr, *add = nullptr;
  const uint32_t* mask = nullptr;
};

// The batch of one step: t tokens of s sequences, r rows to sample. Arrays have the layout of Batch in batch.py.
struct StepInputs {
  const int32_t *tokens, *positions, *slots, *first_row, *q_len, *context_len, *state_from, *state_to, *block_table, *rows;
  const int32_t *window_slots, *window_table;  // as slots and block_table, of windowed caches; null: there are none
  int64_t t, s, r, table_width;
  const RowSampling* draws;
};

constexpr int64_t kPerToken = 3, kPerSequence = 5;  // arrays of a batch with an item per token and per sequence

// Exclusive upper bounds of token ids, positions, slots, block numbers and state slots in a batch, and of slots and blocks
// of windowed caches. state 0: no state slots.
struct Limits {
  int64_t token, position, slot, block, state = 0, window_slot = 0, window_block = 0;
};

}  // namespace intaglio
