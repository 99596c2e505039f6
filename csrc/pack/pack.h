// Packs and quantises checkpoint rows into the panel layout of Weight (isa/kernels.h), once, at load; unpacks single rows.
#pragma once
#include <cstdint>
#include <string>

#include "isa/kernels.h"
#include "pack/format.h"

namespace intaglio {

// Quantised rows as in formats.Quantised. codes [count, k], row-major, one a byte: signed or unsigned integers, bits of E4M3,
// or twice the values of E2M1. scales [count, groups]. lows [count, groups]: zero points of codes, or minima of values.
// units, low_units [count, blocks]: of scales and minima, where the format has them; units [count, 1] of NV4: the factors.
struct CodedRows {
  const uint8_t* codes;
  const float *scales, *lows, *units, *low_units;
};

constexpr int64_t kMaxGroup = 1024;  // largest number of values that share a scale

// The layout of a weight [n, k], without memory. Throws std::invalid_argument for sizes that the kernels do not support.
Weight weight_layout(const Format& format, int64_t n, int64_t k, int64_t group, bool glu);
// Packs rows [first, first + count), given as row-major values. Each thread calls it with its own range of panels.
void pack_rows(const Weight& w, const void* rows, Source type, int64_t first, int64_t count, int64_t begin_panel, int64_t end_panel,
               const Kernels& kernels);
uint16_t to_bf16(float f);  // nearest, ties to even; NaN stays NaN
// Quantises a row of n values to int8row: writes its codes and returns its scale in bf16, NaN if a value is not finite.
uint16_t encode_row(const float* x, int64_t n, int8_t* codes);
// Encodes n values / scale as E4M3, clipped to -448..448; a value that is not finite becomes NaN.
void encode_e4m3(const float* x, int64_t n, float scale, uint8_t* codes);
// Packs rows [first, first + count) of codes as they are. Each thread calls it with its own range of panels.
void pack_coded(const Weight& w, const CodedRows& rows, int64_t first, int64_t count, int64_t begin_panel, int64_t end_panel);
// Dequantises one row to float32 [k]: an embedding lookup.
void unpack_row(const Weight& w, int64_t row, float* out);

}  // namespace intaglio
