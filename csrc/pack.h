// Weights from checkpoint rows into panels. Runs once at load.
#pragma once
#include <cstdint>
#include <string>

#include "kernels.h"

namespace intaglio {

// Page-aligned memory from the system, zeroed; or a whole file, shared with whoever else maps it. In huge pages where that
// can be.
class Memory {
 public:
  Memory() = default;
  explicit Memory(int64_t bytes);
  Memory(int file, int64_t bytes, bool writable);
  ~Memory();
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&& other) noexcept;
  uint8_t* data() const { return data_; }
  int64_t size() const { return size_; }
  bool writable() const { return writable_; }

 private:
  uint8_t* data_ = nullptr;
  int64_t size_ = 0;
  bool writable_ = true;
};

enum class Source : int { F32, F16, BF16 };

// How a weight is kept, apart from its size: codes, scales, and whether a row has one scale.
struct Format {
  Fmt fmt;
  Scale scale;
  bool row;
};

// Rows that are codes already, one a byte as they are kept here [count, k], row-major; with the scales of their groups, what
// is taken off (zeros of codes, or minima of values), and the units of those by block where the format has them.
struct CodedRows {
  const uint8_t* codes;
  const float *scales, *lows, *units, *low_units;
};

// An image with room for [n, k]; throws std::invalid_argument for sizes a kernel cannot take.
Weight weight_layout(const Format& format, int64_t n, int64_t k, int64_t group, bool glu);
// Rows [first, first + count) from row-major values; `panel` selects which panels' rows this call packs (threads).
void pack_rows(const Weight& w, const void* rows, Source type, int64_t first, int64_t count, int64_t begin_panel, int64_t end_panel,
               const Kernels& kernels);
uint16_t to_bf16(float f);  // nearest, ties to even; NaN stays NaN
// A row as int8row: its codes, and its scale in bf16, NaN if a value is not finite.
uint16_t encode_row(const float* x, int64_t n, int8_t* codes);
// Rows [first, first + count) of codes: copied, not chosen.
void pack_coded(const Weight& w, const CodedRows& rows, int64_t first, int64_t count, int64_t begin_panel, int64_t end_panel);
// One row back as float32 [k]: an embedding lookup.
void unpack_row(const Weight& w, int64_t row, float* out);

}  // namespace intaglio
