// Packs weights into the layouts of isa/kernels.h, with one function for each kind of format; quantises values, and reads
// packed rows back. Long because the code that packs a format stands beside the code that reads it back.
#include "pack/pack.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <vector>

namespace intaglio {

uint16_t to_bf16(float f) {
  const uint32_t u = std::bit_cast<uint32_t>(f), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return uint16_t((u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 0x40 : rounded);
}

namespace {

float from_bf16(uint16_t h) { return std::bit_cast<float>(uint32_t(h) << 16); }
float from_f16(uint16_t h) {  // exact in float arithmetic; without F16C the compiler's conversion is a function call
  const uint32_t value = std::bit_cast<uint32_t>(std::bit_cast<float>(uint32_t(h & 0x7fff) << 13) * 0x1p112f);
  return std::bit_cast<float>(uint32_t(h & 0x8000) << 16 | value | ((h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u));
}
uint16_t to_f16(float f) { return std::bit_cast<uint16_t>(_Float16(f)); }

constexpr int64_t kAhead = 512;  // prefetch distance in bytes: hardware prefetchers do not follow 32 rows at once

// Converts values [0, count) of a row to float32.
void widen(const uint8_t* row, Source type, int64_t count, float* out) {
  auto half = reinterpret_cast<const uint16_t*>(row);
  switch (type) {
    case Source::F32: std::memcpy(out, row, size_t(count) * 4); break;
    case Source::F16: for (int64_t i = 0; i < count; i++) out[i] = from_f16(half[i]); break;
    case Source::BF16: for (int64_t i = 0; i < count; i++) out[i] = from_bf16(half[i]); break;
  }
}

void narrow(const float* x, Fmt fmt, int64_t count, uint8_t* out) {
  auto half = reinterpret_cast<uint16_t*>(out);
  switch (fmt) {
    case Fmt::F16: for (int64_t i = 0; i < count; i++) half[i] = to_f16(x[i]); break;
    case Fmt::BF16: for (int64_t i = 0; i < count; i++) half[i] = to_bf16(x[i]); break;
    default: std::memcpy(out, x, size_t(count) * 4); break;
  }
}

// Rows of one panel that are consecutive in the source: lanes lane .. lane + lanes - 1.
struct Strip {
  const uint8_t* rows;
  int64_t stride;  // bytes
  Source type;
  int64_t panel, lane, lanes;

  const uint8_t* row(int64_t i) const { return rows + i * stride; }
};

// The part of rows [first, first + count) that belongs to a panel: `lanes` lanes from `lane` on; the first of them is row `at`
// of these rows. None if lanes <= 0.
struct PanelRows {
  int64_t lane, lanes, at;
};
PanelRows rows_of_panel(const Weight& w, int64_t panel, int64_t first, int64_t count) {
  const int64_t top = w.glu ? panel / 2 * kPanel + panel % 2 * w.half() : panel * kPanel;  // its first row
  const int64_t bottom = std::min(top + kPanel, w.glu && panel % 2 == 0 ? w.half() : w.n);
  const int64_t from = std::max(top, first), to = std::min(bottom, first + count);
  return {from - top, to - from, from - first};
}

template <class T>
T word(const uint8_t* p) {
  T t;
  std::memcpy(&t, p, sizeof t);
  return t;
}

// out[j * width + i] = word j of row i. Moves two rows and two words at a time, as halves of 64-bit words. Uses a whole
// cache line of each row before the next, and writes `out` in order.
void transpose(const uint8_t* rows, int64_t stride, int64_t lanes, int64_t count, uint32_t* out, int64_t width) {
  constexpr int64_t line = 16;
  for (int64_t at = 0; at < count; at += line) {
    const int64_t words = std::min(line, count - at), paired = lanes % 2 || words % 2 ? 0 : words;
    for (int64_t i = 0; i < lanes && paired; i += 2) {
      const uint8_t *a = rows + i * stride + at * 4, *b = a + stride;
      __builtin_prefetch(a + kAhead), __builtin_prefetch(b + kAhead);
      uint32_t* to = out + at * width + i;
      for (int64_t j = 0; j < paired; j += 2) {
        uint64_t x = word<uint64_t>(a + j * 4), y = word<uint64_t>(b + j * 4);
        uint64_t even = (x & 0xffffffff) | y << 32, odd = x >> 32 | (y & 0xffffffff00000000);
        std::memcpy(to + j * width, &even, 8);
        std::memcpy(to + (j + 1) * width, &odd, 8);
      }
    }
    for (int64_t i = 0; i < lanes; i++)
      for (int64_t j = paired; j < words; j++) out[(at + j) * width + i] = word<uint32_t>(rows + i * stride + (at + j) * 4);
  }
}

void transpose(const uint8_t* rows, int64_t stride, int64_t lanes, int64_t count, uint16_t* out, int64_t width) {
  for (int64_t j = 0; j < count; j++)
    for (int64_t i = 0; i < lanes; i++) out[j * width + i] = word<uint16_t>(rows + i * stride + j * 2);
}

// Writes `count` values of each row of a strip, given in the weight's plain format, to its panel from K index `at` on.
void write_plain(const Weight& w, const Strip& s, const uint8_t* rows, int64_t stride, int64_t at, int64_t count) {
  uint8_t* base = w.data + s.panel * w.panel_bytes;
  if (w.fmt == Fmt::F16) {
    transpose(rows, stride, s.lanes, count, reinterpret_cast<uint16_t*>(base) + at * kPanel + s.lane, kPanel);
  } else {
    const int64_t each = w.fmt == Fmt::BF16 ? 2 : 1;  // values in a word
    transpose(rows, stride, s.lanes, count / each, reinterpret_cast<uint32_t*>(base) + at / each * kPanel + s.lane, kPanel);
  }
}

void pack_plain(const Weight& w, const Strip& s) {
  const bool same = (w.fmt == Fmt::F32 && s.type == Source::F32) || (w.fmt == Fmt::F16 && s.type == Source::F16) ||
                    (w.fmt == Fmt::BF16 && s.type == Source::BF16);
  if (same && w.padded_k == w.k) return write_plain(w, s, s.rows, s.stride, 0, w.k);
  constexpr int64_t block = 256;
  const int64_t from = s.type == Source::F32 ? 4 : 2, to = w.fmt == Fmt::F32 ? 4 : 2;
  alignas(64) uint8_t tile[kPanel * block * 4];
  alignas(64) float x[block];
  for (int64_t at = 0; at < w.padded_k; at += block) {
    const int64_t count = std::min(block, w.padded_k - at), held = std::min(count, w.k - at);
    std::fill(x + held, x + count, 0.0f);
    for (int64_t i = 0; i < s.lanes; i++) {
      widen(s.row(i) + at * from, s.type, held, x);
      narrow(x, w.fmt, count, tile + i * block * to);
    }
    write_plain(w, s, tile, block * to, at, count);
  }
}

struct GroupAt {  // addresses of one group of a panel: the head of its block, its index in the block, its codes
  uint8_t* head;
  int64_t index;
  uint8_t* codes;
};
GroupAt group_at(const Weight& w, int64_t panel, int64_t g) {
  uint8_t* head = w.data + panel * w.panel_bytes + w.factor_bytes() + g / w.block() * w.block_bytes();
  return {head, g % w.block(), head + w.head_bytes() + g % w.block() * w.code_bytes()};
}

struct Range {
  float low, high, poison;  // NaN if a value is not finite, else 0
};

// The range of `count` values, a multiple of 8. Eight independent chains let the compiler vectorise the loop.
Range range_of(const float* x, int64_t count) {
  constexpr int64_t step = 8;
  float lows[step] = {}, highs[step] = {}, poison[step] = {};
  for (int64_t i = 0; i < count; i += step)
    for (int64_t j = 0; j < step; j++) {
      lows[j] = x[i + j] < lows[j] ? x[i + j] : lows[j];
      highs[j] = x[i + j] > highs[j] ? x[i + j] : highs[j];
      poison[j] += x[i + j] * 0.0f;
    }
  return {*std::min_element(lows, lows + step), *std::max_element(highs, highs + step), std::accumulate(poison, poison + step, 0.0f)};
}

// The scale of a group with values in range r, rounded to its stored format, as formats.quantise() chooses it. NaN if a value
// is not finite, so that it shows in results and is not lost in a code.
float scale_of(Fmt fmt, Range r) {
  if (r.poison != 0) return NAN;
  const float peak = std::max(-r.low, r.high);
  if (peak < kTiny) return 0;
  switch (fmt) {
    case Fmt::I8: return from_bf16(to_bf16(peak / 127.0f));
    case Fmt::I4: return from_bf16(to_bf16((-r.low >= r.high ? r.low : r.high) / -8.0f));
    case Fmt::MX4: return std::bit_cast<float>((std::bit_cast<uint32_t>(peak) & 0x7f800000) - (3u << 23));
    default: return peak / 448.0f;
  }
}

// Smallest and largest code of a format.
struct CodeRange {
  float lowest, highest;
};
CodeRange code_range(Fmt fmt) {
  const float highest = fmt == Fmt::I8 ? 127.0f : fmt == Fmt::I4 ? 7.0f : fmt == Fmt::MX4 ? 12.0f : 448.0f;
  return {fmt == Fmt::I4 ? -8.0f : -highest, highest};
}

// The scale with the least squared error among a group's scale and four near it, as formats.quantise() searches.
float searched_scale(Fmt fmt, Range r, const float* x, int64_t count, const Kernels& kernels) {
  const float first = scale_of(fmt, r);
  const bool wide = fmt == Fmt::I8;
  if ((!wide && fmt != Fmt::I4) || first == 0 || std::isnan(first)) return first;
  const float farthest = -r.low >= r.high ? r.low : r.high, reach = wide ? std::fabs(farthest) : farthest;
  const float end = wide ? 127.0f : -8.0f, step = wide ? 0.5f : 0.375f;
  float tried[kTried] = {first, 1, -1, 2, -2};
  for (int t = 1; t < kTried; t++) tried[t] = from_bf16(to_bf16(reach / (end + tried[t] * step)));
  const CodeRange ends = code_range(fmt);
  return kernels.choose_scale(x, count, tried, ends.lowest, ends.highest);
}

uint8_t to_e4m3(float v) {  // |v| <= 448 and no NaN; nearest, ties to even
  const uint32_t u = std::bit_cast<uint32_t>(v), sign = u >> 24 & 128, size = u & 0x7fffffff;
  if (size < 0x3c800000)  // below 2^-6: multiples of 2^-9
    return uint8_t(sign | (std::bit_cast<uint32_t>(std::bit_cast<float>(size) * 512.0f + 0x1.8p23f) & 15));
  return uint8_t(sign | (((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3)));
}

uint8_t to_e2m1(float v) {  // v: twice the value, |v| <= 12. To the nearest of 0, 1, 2, 3, 4, 6, 8, 12; ties to the even code
  const float y = std::fabs(v);
  return uint8_t((y > 0.5f) + (y >= 1.5f) + (y > 2.5f) + (y >= 3.5f) + (y > 5) + (y >= 7) + (y > 10) + (std::signbit(v) ? 8 : 0));
}

// Converts values to codes, plus the format's offset. The order of operations is that of formats.quantise(): times 1 / scale,
// rounded to nearest even, clipped. NaN becomes 0; the group's scale is NaN then.
void encode(Fmt fmt, const float* x, int64_t count, float scale, uint8_t* codes) {
  const float inverse = scale != 0 ? 1.0f / scale : 0.0f;
  const CodeRange ends = code_range(fmt);
  const int32_t offset = fmt == Fmt::I8 ? 128 : 8;
  auto each = [&](auto code) {
    for (int64_t i = 0; i < count; i++) {
      float v = x[i] * inverse;
      v = v == v ? v : 0.0f;
      v = v > ends.lowest ? v : ends.lowest;
      codes[i] = code(v < ends.highest ? v : ends.highest);
    }
  };
  if (fmt == Fmt::FP8) each(to_e4m3);
  else if (fmt == Fmt::MX4) each(to_e2m1);
  else each([=](float v) { return uint8_t(std::bit_cast<int32_t>(v + 0x1.8p23f) + offset); });  // the low bits of v + 1.5 * 2^23 are v rounded to an integer
}

float from_e4m3(uint32_t code) {
  const float size = (code & 127) == 127 ? NAN : std::bit_cast<float>((code & 127) << 20) * 0x1p120f;
  return code & 128 ? -size : size;
}

int64_t e4m3_at(int64_t lane) { return lane / 4 % 4 * 16 + lane / 16 * 8 + lane % 4 * 2; }

// Writes 4-bit codes of rows [0, lanes), `stride` bytes apart, to the strip's lanes of a group.
void write_nibbles(const Weight& w, const Strip& s, const uint8_t* codes, int64_t stride, uint8_t* to) {
  static_assert(kPanel == 32);
  if (s.lanes == kPanel) {
    alignas(64) uint8_t both[kPanel / 2 * kMaxGroup];
    for (int64_t i = 0; i < kPanel / 2; i++)
      for (int64_t j = 0; j < w.group; j++)
        both[i * w.group + j] = uint8_t(codes[i * stride + j] | codes[(i + kPanel / 2) * stride + j] << 4);
    return transpose(both, w.group, kPanel / 2, w.group / 4, reinterpret_cast<uint32_t*>(to), kPanel / 2);
  }
  for (int64_t i = 0; i < s.lanes; i++)
    for (int64_t j = 0; j < w.group; j++) {
      const int64_t lane = s.lane + i;
      uint8_t &byte = to[j / 4 * 64 + lane % 16 * 4 + j % 4], code = codes[i * stride + j];
      byte = lane < 16 ? uint8_t((byte & 0xf0) | code) : uint8_t((byte & 0x0f) | code << 4);
    }
}

// Position of value j of a K6 group: the low six bits of byte `byte` + 64 * `part` or, for part 3, the high two bits of the
// bytes `byte`, `byte` + 64 and `byte` + 128.
struct SixBitPosition {
  int64_t byte, part;
};
SixBitPosition six_bit_position(int64_t lane, int64_t j) { return {j / 8 * 192 + lane % 16 * 4 + j % 4, j / 4 % 2 * 2 + lane / 16}; }

// Where a K5 group's value j is: its nibble's byte, which has two lanes', and a bit of the byte with its fifth.
struct FiveAt {
  int64_t byte, high;
  int bit;
};
FiveAt five_at(int64_t lane, int64_t j) {
  const int64_t base = j / 16 * 320, quad = j / 4 % 4, at = lane % 16 * 4 + j % 4;
  return {base + quad * 64 + at, base + 256 + at, int(2 * quad + lane / 16)};
}

constexpr int8_t kLevels[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};  // twice the values of E2M1's codes

// Stored code for each code of a checkpoint: integers plus the format's offset, or the E2M1 bits of twice the value.
struct StoredCodes {
  uint8_t of[256] = {};
  explicit StoredCodes(Fmt fmt) {
    const bool levels = fmt == Fmt::MX4 || fmt == Fmt::NV4;
    const int offset = fmt == Fmt::I8 ? 128 : fmt == Fmt::I4 ? 8 : fmt == Fmt::K6 ? 32 : 0;
    for (int code = 0; code < 256; code++) of[code] = uint8_t(levels ? 0 : code + offset);
    for (int bits = 15; levels && bits >= 0; bits--) of[uint8_t(kLevels[bits])] = uint8_t(bits);
  }
};

// Writes codes of rows [0, lanes), `stride` bytes apart, to the strip's lanes of group g.
void write_codes(const Weight& w, const Strip& s, int64_t g, const uint8_t* codes, int64_t stride) {
  uint8_t* to = group_at(w, s.panel, g).codes;
  if (w.wide()) return transpose(codes, stride, s.lanes, w.group / 4, reinterpret_cast<uint32_t*>(to) + s.lane, kPanel);
  if (w.fmt == Fmt::FP8) {
    for (int64_t i = s.lane; i < s.lane + s.lanes; i++)
      for (int64_t j = 0; j < w.group; j += 2) std::memcpy(to + j * kPanel + e4m3_at(i), codes + (i - s.lane) * stride + j, 2);
  } else if (w.fmt == Fmt::K6) {
    for (int64_t i = 0; i < s.lanes; i++)
      for (int64_t j = 0; j < w.group; j++) {
        const uint8_t code = codes[i * stride + j];
        const SixBitPosition at = six_bit_position(s.lane + i, j);
        for (int64_t b = 0; b < 3; b++) {
          uint8_t& own = to[at.byte + b * 64];
          if (at.part == 3) own = uint8_t((own & 63) | code >> 2 * b << 6);
          else if (at.part == b) own = uint8_t((own & 192) | code);
        }
      }
  } else if (w.fmt == Fmt::K5) {
    for (int64_t i = 0; i < s.lanes; i++)
      for (int64_t j = 0; j < w.group; j++) {
        const int64_t lane = s.lane + i;
        const uint8_t code = codes[i * stride + j];
        const FiveAt at = five_at(lane, j);
        uint8_t &both = to[at.byte], &high = to[at.high];
        both = lane < 16 ? uint8_t((both & 0xf0) | (code & 15)) : uint8_t((both & 0x0f) | code << 4);
        high = uint8_t((high & ~(1 << at.bit)) | (code >> 4 & 1) << at.bit);
      }
  } else {
    write_nibbles(w, s, codes, stride, to);
  }
}

// Writes lane `lane` of an array of scales, or of minima stored as scales are.
void put_float(const Weight& w, uint8_t* array, int64_t lane, float value) {
  const uint16_t half = w.scale == Scale::F16 ? to_f16(value) : to_bf16(value);
  if (w.scale == Scale::F32) std::memcpy(array + lane * 4, &value, 4);
  else std::memcpy(array + lane * 2, &half, 2);
}

void put_scale(const Weight& w, int64_t lane, const GroupAt& at, float scale) {
  put_float(w, at.head, lane, scale);
}

// `value` in units, of which it is an integer multiple; 0 if the unit is 0 or not finite (then so is the value).
int whole(float value, float unit) {
  const float n = value / unit;
  return std::fabs(n) <= 128 ? int(std::lround(n)) : 0;
}

void put_field(uint8_t* words, int64_t lane, int shift, uint32_t mask, int value) {
  uint32_t own = word<uint32_t>(words + lane * 4);
  own = (own & ~(mask << shift)) | uint32_t(value) << shift;
  std::memcpy(words + lane * 4, &own, 4);
}

// Writes the unit of a K4 or K5 block's minima, and a group's scale and minimum in units.
void put_lines(const Weight& w, int64_t lane, const GroupAt& at, float low_unit, int size, int low) {
  const uint16_t half = to_f16(low_unit);
  std::memcpy(at.head + (kPanel + lane) * w.scale_bytes(), &half, 2);
  const int span = int(at.index / 4), j = int(at.index % 4);
  put_field(at.head + kPanel * (4 + 4 * span), lane, 8 * j, 255, (size & 15) | (low & 15) << 4);
  put_field(at.head + kPanel * 12, lane, 8 * j + 4 * span, 15, size >> 4 | low >> 4 << 2);
}

// Where the factor of a row's scales is.
uint8_t* factor_at(const Weight& w, int64_t panel, int64_t lane) { return w.data + panel * w.panel_bytes + lane * 4; }

// Writes a group's scale as E4M3, of which it is the product with the row's factor, and the factor. A scale that is not
// finite makes the factor NaN, and so the whole row.
void put_factored(const Weight& w, int64_t lane, int64_t panel, const GroupAt& at, float factor, float scale) {
  const float ratio = scale / factor, sound = std::isfinite(ratio) ? std::clamp(ratio, -448.0f, 448.0f) : 0.0f;  // factor 0: 0
  uint8_t* held = factor_at(w, panel, lane);
  const float own = std::isfinite(scale) && !(at.head > held + kPanel * 4 && std::isnan(word<float>(held))) ? factor : NAN;
  std::memcpy(held, &own, 4);
  at.head[lane] = to_e4m3(sound);
}

// Writes scale, zero point or minimum, and units of group g of row i of `rows` to the head of its block.
void put_head(const Weight& w, int64_t lane, int64_t panel, const GroupAt& at, int64_t i, int64_t g, const CodedRows& rows) {
  const int64_t groups = (w.k + w.group - 1) / w.group, blocks = groups / w.block();
  const float scale = rows.scales[i * groups + g];
  if (w.factors()) return put_factored(w, lane, panel, at, rows.units[i], scale);
  if (w.block() == 1) {
    put_scale(w, lane, at, scale);
    uint8_t* lows = at.head + kPanel * w.scale_bytes();
    if (w.zeros()) lows[lane] = uint8_t(rows.lows[i * groups + g]);
    if (w.affine()) put_float(w, lows, lane, rows.lows[i * groups + g]);
    return;
  }
  const float unit = rows.units[i * blocks + g / w.block()];
  put_scale(w, lane, at, unit);
  const int size = whole(scale, unit);
  if (w.fmt == Fmt::K6) {
    at.head[kPanel * (2 + at.index) + lane] = uint8_t(size);
    return;
  }
  const float low_unit = rows.low_units[i * blocks + g / w.block()];
  put_lines(w, lane, at, low_unit, size, whole(rows.lows[i * groups + g], low_unit));
}

void pack_codes(const Weight& w, const Strip& s, const Kernels& kernels) {
  alignas(64) uint8_t codes[kPanel * kMaxGroup];
  alignas(64) float x[kMaxGroup];
  const int64_t each = s.type == Source::F32 ? 4 : 2;
  auto read = [&](int64_t i, int64_t g) {
    const int64_t count = std::min(w.group, w.k - g * w.group);
    const uint8_t* row = s.row(i) + g * w.group * each;
    for (int64_t b = 0; b < w.group * each; b += 64) __builtin_prefetch(row + kAhead + b);
    widen(row, s.type, count, x);
    std::fill(x + count, x + w.group, 0.0f);
    return range_of(x, w.group);
  };
  Range all[kPanel];
  for (int64_t i = 0; i < s.lanes && w.row; i++) {
    all[i] = read(i, 0);
    for (int64_t g = 1; g * w.group < w.k; g++) {
      const Range r = read(i, g);
      all[i] = {std::min(all[i].low, r.low), std::max(all[i].high, r.high), all[i].poison + r.poison};
    }
  }
  for (int64_t g = 0; g * w.group < w.k; g++) {
    for (int64_t i = 0; i < s.lanes; i++) {
      const Range own = read(i, g);
      const float scale = w.row ? scale_of(w.fmt, all[i]) : searched_scale(w.fmt, own, x, w.group, kernels);
      put_scale(w, s.lane + i, group_at(w, s.panel, g), scale);
      encode(w.fmt, x, w.group, scale, codes + i * w.group);
    }
    write_codes(w, s, g, codes, w.group);
  }
}

void pack_lines(const Weight& w, const Strip& s, const Kernels& kernels) {
  alignas(64) uint8_t codes[kPanel * kBlock];
  alignas(64) float x[kBlock];
  LineBlock block;
  const int64_t each = s.type == Source::F32 ? 4 : 2;
  for (int64_t from = 0, g = 0; from < w.k; from += kBlock, g += w.block()) {
    for (int64_t i = 0; i < s.lanes; i++) {
      widen(s.row(i) + from * each, s.type, kBlock, x);
      kernels.choose_lines(x, &block);
      for (int64_t j = 0; j < w.block(); j++) {
        const GroupAt at = group_at(w, s.panel, g + j);
        put_scale(w, s.lane + i, at, block.unit);
        put_lines(w, s.lane + i, at, block.low_unit, block.sizes[j], block.lows[j]);
      }
      std::memcpy(codes + i * kBlock, block.codes, kBlock);
    }
    for (int64_t j = 0; j < w.block(); j++) write_codes(w, s, g + j, codes + j * w.group, kBlock);
  }
}

// Parameters that dequantise a group's codes in one row: value = (code - zero) * scale - low.
struct Dequantiser {
  float scale, zero, low;
};
Dequantiser dequantiser_of(const Weight& w, int64_t panel, const GroupAt& at, int64_t lane) {
  auto float_at = [&](const uint8_t* p) { return w.scale == Scale::F32 ? word<float>(p) : (w.scale == Scale::F16 ? from_f16 : from_bf16)(word<uint16_t>(p)); };
  const uint8_t *own = at.head + lane * w.scale_bytes(), *lows = own + kPanel * w.scale_bytes();
  if (w.factors()) return {from_e4m3(*own) * word<float>(factor_at(w, panel, lane)), 0, 0};
  const float scale = float_at(own);
  if (w.affine()) return {scale, 0, float_at(lows)};
  if (w.zeros()) return {scale, float(at.head[kPanel * w.scale_bytes() + lane]), 0};
  if (w.fmt == Fmt::K6) return {scale * float(int8_t(at.head[kPanel * (2 + at.index) + lane])), 32, 0};
  if (w.lines()) {
    const int64_t span = at.index / 4, byte = lane * 4 + at.index % 4;
    const int both = at.head[kPanel * (4 + 4 * span) + byte], high = at.head[kPanel * 12 + byte] >> 4 * span;
    const int size = (both & 15) | (high & 3) << 4, low = both >> 4 | (high >> 2 & 3) << 4;
    return {scale * float(size), 0, from_f16(word<uint16_t>(at.head + (kPanel + lane) * 2)) * float(low)};
  }
  return {scale, w.fmt == Fmt::I8 ? 128.0f : w.fmt == Fmt::I4 ? 8.0f : 0.0f, 0};
}

// Value of code j of a row in one group, without scale and zero point.
float number(const Weight& w, const GroupAt& at, int64_t lane, int64_t j) {
  if (w.fmt == Fmt::FP8) {
    return from_e4m3(at.codes[j / 2 * 64 + e4m3_at(lane) + j % 2]);
  }
  if (w.wide()) return at.codes[(j / 4 * kPanel + lane) * 4 + j % 4];
  if (w.fmt == Fmt::K6) {
    const SixBitPosition six = six_bit_position(lane, j);
    const uint8_t* own = at.codes + six.byte;
    return float(six.part < 3 ? own[six.part * 64] & 63 : own[0] >> 6 | own[64] >> 6 << 2 | own[128] >> 6 << 4);
  }
  if (w.fmt == Fmt::K5) {
    const FiveAt five = five_at(lane, j);
    return float((at.codes[five.byte] >> (lane < 16 ? 0 : 4) & 15) | (at.codes[five.high] >> five.bit & 1) << 4);
  }
  const int nibble = (at.codes[j / 4 * 64 + lane % 16 * 4 + j % 4] >> (lane < 16 ? 0 : 4)) & 15;
  if (w.book()) return w.levels()[nibble];
  return float(w.fmt == Fmt::MX4 || w.fmt == Fmt::NV4 ? kLevels[nibble] : nibble);
}

}  // namespace

void pack_rows(const Weight& w, const void* rows, Source type, int64_t first, int64_t count, int64_t begin, int64_t end,
               const Kernels& kernels) {
  const int64_t stride = w.k * (type == Source::F32 ? 4 : 2);
  for (int64_t panel = begin; panel < end; panel++) {
    const PanelRows h = rows_of_panel(w, panel, first, count);
    if (h.lanes <= 0) continue;
    const Strip s{static_cast<const uint8_t*>(rows) + h.at * stride, stride, type, panel, h.lane, h.lanes};
    w.fmt == Fmt::K4 ? pack_lines(w, s, kernels) : w.group ? pack_codes(w, s, kernels) : pack_plain(w, s);
  }
}

uint16_t encode_row(const float* x, int64_t n, int8_t* codes) {
  float peak = 0, poison = 0;
  for (int64_t i = 0; i < n; i++) peak = std::max(peak, std::fabs(x[i])), poison += x[i] * 0.0f;
  const float scale = scale_of(Fmt::I8, {-peak, peak, poison});
  encode(Fmt::I8, x, n, scale, reinterpret_cast<uint8_t*>(codes));
  for (int64_t i = 0; i < n; i++) codes[i] = int8_t(codes[i] ^ -128);
  return to_bf16(scale);
}

void encode_e4m3(const float* x, int64_t n, float scale, uint8_t* codes) {
  for (int64_t i = 0; i < n; i++) {
    const float v = std::min(448.0f, std::max(-448.0f, x[i] / scale));
    codes[i] = std::isfinite(x[i]) ? to_e4m3(v) : 127;
  }
}

void pack_coded(const Weight& w, const CodedRows& rows, int64_t first, int64_t count, int64_t begin, int64_t end) {
  const int64_t groups = (w.k + w.group - 1) / w.group;
  const StoredCodes kept(w.fmt);
  std::vector<uint8_t> own(size_t(kPanel * w.group));  // codes beyond the row's end are multiplied by zeros of x, so their values do not matter
  for (int64_t panel = begin; panel < end; panel++) {
    const PanelRows h = rows_of_panel(w, panel, first, count);
    const Strip s{nullptr, 0, Source::F32, panel, h.lane, h.lanes};
    for (int64_t g = 0; g < groups && h.lanes > 0; g++) {
      const int64_t held = std::min(w.group, w.k - g * w.group);
      for (int64_t i = 0; i < s.lanes; i++) {
        put_head(w, s.lane + i, panel, group_at(w, panel, g), h.at + i, g, rows);
        const uint8_t* codes = rows.codes + (h.at + i) * w.k + g * w.group;
        for (int64_t j = 0; j < held; j++) own[size_t(i * w.group + j)] = kept.of[codes[j]];
      }
      write_codes(w, s, g, own.data(), w.group);
    }
  }
}

void unpack_row(const Weight& w, int64_t row, float* out) {
  const int64_t panel = w.panel_of(row), lane = w.lane_of(row);
  const uint8_t* base = w.data + panel * w.panel_bytes;
  auto plain = reinterpret_cast<const float*>(base) + lane;
  auto half = reinterpret_cast<const uint16_t*>(base);
  switch (w.fmt) {
    case Fmt::F32: for (int64_t i = 0; i < w.k; i++) out[i] = plain[i * kPanel]; break;
    case Fmt::F16: for (int64_t i = 0; i < w.k; i++) out[i] = from_f16(half[i * kPanel + lane]); break;
    case Fmt::BF16: for (int64_t i = 0; i < w.k; i++) out[i] = from_bf16(half[(i / 2 * kPanel + lane) * 2 + i % 2]); break;
    default:
      for (int64_t g = 0; g * w.group < w.k; g++) {
        const GroupAt at = group_at(w, panel, g);
        const Dequantiser step = dequantiser_of(w, panel, at, lane);
        for (int64_t j = 0; j < std::min(w.group, w.k - g * w.group); j++)
          out[g * w.group + j] = (number(w, at, lane, j) - step.zero) * step.scale - step.low;
      }
  }
}

}  // namespace intaglio
