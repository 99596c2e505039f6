#include "pack.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <new>
#include <numeric>
#include <stdexcept>
#include <system_error>
#include <utility>
#include <vector>

namespace intaglio {

uint16_t to_bf16(float f) {
  const uint32_t u = std::bit_cast<uint32_t>(f), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return uint16_t((u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 0x40 : rounded);
}

namespace {

float from_bf16(uint16_t h) { return std::bit_cast<float>(uint32_t(h) << 16); }
float from_f16(uint16_t h) {  // in float arithmetic, which rounds nothing here: without F16C a conversion is a call
  const uint32_t value = std::bit_cast<uint32_t>(std::bit_cast<float>(uint32_t(h & 0x7fff) << 13) * 0x1p112f);
  return std::bit_cast<float>(uint32_t(h & 0x8000) << 16 | value | ((h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u));
}
uint16_t to_f16(float f) { return std::bit_cast<uint16_t>(_Float16(f)); }

constexpr int64_t kAhead = 512;  // bytes of a row asked for early: 32 rows at once are more than hardware follows

// Values [0, count) of a row as float32.
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

// Rows of one panel that follow each other in the source.
struct Strip {
  const uint8_t* rows;
  int64_t stride;  // bytes
  Source type;
  int64_t panel, lane, lanes;

  const uint8_t* row(int64_t i) const { return rows + i * stride; }
};

// Which of the rows [first, first + count) a panel has: its lanes from `lane` on, row `at` of them first. None: lanes <= 0.
struct Held {
  int64_t lane, lanes, at;
};
Held held_by(const Weight& w, int64_t panel, int64_t first, int64_t count) {
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

// out[j * width + i] = word j of row i. Two rows and two words at a time, as halves of 64-bit words; a cache line of each
// row is used whole before the next, and `out` is written in order.
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

// `count` values of each row of a strip, in the weight's own plain format, into its panel from column `at` on.
void lay(const Weight& w, const Strip& s, const uint8_t* rows, int64_t stride, int64_t at, int64_t count) {
  uint8_t* base = w.data + s.panel * w.panel_bytes;
  if (w.fmt == Fmt::F16) {
    transpose(rows, stride, s.lanes, count, reinterpret_cast<uint16_t*>(base) + at * kPanel + s.lane, kPanel);
  } else {
    const int64_t each = w.fmt == Fmt::BF16 ? 2 : 1;  // values a word
    transpose(rows, stride, s.lanes, count / each, reinterpret_cast<uint32_t*>(base) + at / each * kPanel + s.lane, kPanel);
  }
}

void pack_plain(const Weight& w, const Strip& s) {
  const bool same = (w.fmt == Fmt::F32 && s.type == Source::F32) || (w.fmt == Fmt::F16 && s.type == Source::F16) ||
                    (w.fmt == Fmt::BF16 && s.type == Source::BF16);
  if (same && w.padded_k == w.k) return lay(w, s, s.rows, s.stride, 0, w.k);
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
    lay(w, s, tile, block * to, at, count);
  }
}

constexpr int64_t kMaxGroup = 1024;

struct GroupAt {  // where one group of a panel stands: the head of its block, its place there, its codes
  uint8_t* head;
  int64_t index;
  uint8_t* codes;
};
GroupAt group_at(const Weight& w, int64_t panel, int64_t g) {
  uint8_t* head = w.data + panel * w.panel_bytes + g / w.block() * w.block_bytes();
  return {head, g % w.block(), head + w.head_bytes() + g % w.block() * w.code_bytes()};
}

struct Range {
  float low, high, poison;  // NaN if a value is not finite, else 0
};

// Of `count` values, a multiple of 8. Columns of 8 keep the loop free of any order that would
// stop a compiler.
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

// The scale of values in a range, rounded as it is kept; the choice is formats.quantise()'s. What is not finite makes the
// scale NaN, so that it reaches the result instead of vanishing in a code.
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

// What codes reach.
struct Ends {
  float lowest, highest;
};
Ends ends_of(Fmt fmt) {
  const float highest = fmt == Fmt::I8 ? 127.0f : fmt == Fmt::I4 ? 7.0f : fmt == Fmt::MX4 ? 12.0f : 448.0f;
  return {fmt == Fmt::I4 ? -8.0f : -highest, highest};
}

// Of a group's scale and four beside it, that of the least squared error; the search is formats.quantise()'s.
float searched(Fmt fmt, Range r, const float* x, int64_t count, const Kernels& kernels) {
  const float first = scale_of(fmt, r);
  const bool wide = fmt == Fmt::I8;
  if ((!wide && fmt != Fmt::I4) || first == 0 || std::isnan(first)) return first;
  const float farthest = -r.low >= r.high ? r.low : r.high, reach = wide ? std::fabs(farthest) : farthest;
  const float end = wide ? 127.0f : -8.0f, step = wide ? 0.5f : 0.375f;
  float tried[kTried] = {first, 1, -1, 2, -2};
  for (int t = 1; t < kTried; t++) tried[t] = from_bf16(to_bf16(reach / (end + tried[t] * step)));
  const Ends ends = ends_of(fmt);
  return kernels.choose_scale(x, count, tried, ends.lowest, ends.highest);
}

uint8_t to_e4m3(float v) {  // |v| <= 448 and no NaN; nearest, ties to even
  const uint32_t u = std::bit_cast<uint32_t>(v), sign = u >> 24 & 128, size = u & 0x7fffffff;
  if (size < 0x3c800000)  // below 2^-6: multiples of 2^-9
    return uint8_t(sign | (std::bit_cast<uint32_t>(std::bit_cast<float>(size) * 512.0f + 0x1.8p23f) & 15));
  return uint8_t(sign | (((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3)));
}

uint8_t to_e2m1(float v) {  // twice a value, |v| <= 12: ties go to the even of codes 0, 1, 2, 3, 4, 6, 8, 12
  const float y = std::fabs(v);
  return uint8_t((y > 0.5f) + (y >= 1.5f) + (y > 2.5f) + (y >= 3.5f) + (y > 5) + (y >= 7) + (y > 10) + (std::signbit(v) ? 8 : 0));
}

// Values as codes, above their offset where they have one; the order of choices is that of formats.quantise(): values
// times 1 / scale, to nearest even, clipped. NaN becomes zero: its scale says what it is.
void encode(Fmt fmt, const float* x, int64_t count, float scale, uint8_t* codes) {
  const float inverse = scale != 0 ? 1.0f / scale : 0.0f;
  const Ends ends = ends_of(fmt);
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
  else each([=](float v) { return uint8_t(std::bit_cast<int32_t>(v + 0x1.8p23f) + offset); });  // whose last bits are v, rounded
}

int64_t e4m3_at(int64_t lane) { return lane / 4 % 4 * 16 + lane / 16 * 8 + lane % 4 * 2; }

// Nibbles of rows [0, lanes), `stride` apart, to where the strip has them.
void lay_nibbles(const Weight& w, const Strip& s, const uint8_t* codes, int64_t stride, uint8_t* to) {
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

// Where a K6 group's value j is: six bits of a byte, or of the fourth of four values, `part`, the high two of three bytes.
struct SixAt {
  int64_t byte, part;
};
SixAt six_at(int64_t lane, int64_t j) { return {j / 8 * 192 + lane % 16 * 4 + j % 4, j / 4 % 2 * 2 + lane / 16}; }

// Codes of rows [0, lanes) of group g, `stride` apart, to where the strip has them.
void lay_codes(const Weight& w, const Strip& s, int64_t g, const uint8_t* codes, int64_t stride) {
  uint8_t* to = group_at(w, s.panel, g).codes;
  if (w.wide()) return transpose(codes, stride, s.lanes, w.group / 4, reinterpret_cast<uint32_t*>(to) + s.lane, kPanel);
  if (w.fmt == Fmt::FP8) {
    for (int64_t i = s.lane; i < s.lane + s.lanes; i++)
      for (int64_t j = 0; j < w.group; j += 2) std::memcpy(to + j * kPanel + e4m3_at(i), codes + (i - s.lane) * stride + j, 2);
  } else if (w.fmt == Fmt::K6) {
    for (int64_t i = 0; i < s.lanes; i++)
      for (int64_t j = 0; j < w.group; j++) {
        const uint8_t code = codes[i * stride + j];
        const SixAt at = six_at(s.lane + i, j);
        for (int64_t b = 0; b < 3; b++) {
          uint8_t& own = to[at.byte + b * 64];
          if (at.part == 3) own = uint8_t((own & 63) | code >> 2 * b << 6);
          else if (at.part == b) own = uint8_t((own & 192) | code);
        }
      }
  } else {
    lay_nibbles(w, s, codes, stride, to);
  }
}

void put_scale(const Weight& w, int64_t lane, const GroupAt& at, float scale) {
  const uint16_t half = w.scale == Scale::F16 ? to_f16(scale) : to_bf16(scale);
  if (w.scale == Scale::F32) std::memcpy(at.head + lane * 4, &scale, 4);
  else std::memcpy(at.head + lane * 2, &half, 2);
}

// `value`, which is a whole number of units; 0 where a unit is 0 or not finite, and the value with it.
int whole(float value, float unit) {
  const float n = value / unit;
  return std::fabs(n) <= 128 ? int(std::lround(n)) : 0;
}

void put_field(uint8_t* words, int64_t lane, int shift, uint32_t mask, int value) {
  uint32_t own = word<uint32_t>(words + lane * 4);
  own = (own & ~(mask << shift)) | uint32_t(value) << shift;
  std::memcpy(words + lane * 4, &own, 4);
}

// The unit of K4's minima, and a group's scale and minimum in units.
void put_lines(const Weight& w, int64_t lane, const GroupAt& at, float low_unit, int size, int low) {
  const uint16_t half = to_f16(low_unit);
  std::memcpy(at.head + (kPanel + lane) * w.scale_bytes(), &half, 2);
  const int span = int(at.index / 4), j = int(at.index % 4);
  put_field(at.head + kPanel * (4 + 4 * span), lane, 8 * j, 255, (size & 15) | (low & 15) << 4);
  put_field(at.head + kPanel * 12, lane, 8 * j + 4 * span, 15, size >> 4 | low >> 4 << 2);
}

// What row i of what is copied has beside its codes in group g, to the head of their block.
void put_head(const Weight& w, int64_t lane, const GroupAt& at, int64_t i, int64_t g, const CodedRows& rows) {
  const int64_t groups = (w.k + w.group - 1) / w.group, blocks = groups / w.block();
  const float scale = rows.scales[i * groups + g];
  if (w.block() == 1) {
    put_scale(w, lane, at, scale);
    if (w.zeros()) at.head[kPanel * w.scale_bytes() + lane] = uint8_t(rows.lows[i * groups + g]);
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
      const float scale = w.row ? scale_of(w.fmt, all[i]) : searched(w.fmt, own, x, w.group, kernels);
      put_scale(w, s.lane + i, group_at(w, s.panel, g), scale);
      encode(w.fmt, x, w.group, scale, codes + i * w.group);
    }
    lay_codes(w, s, g, codes, w.group);
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
    for (int64_t j = 0; j < w.block(); j++) lay_codes(w, s, g + j, codes + j * w.group, kBlock);
  }
}

// What makes values of a row's codes in one group: (code - zero) * scale - low.
struct Step {
  float scale, zero, low;
};
Step step_of(const Weight& w, const GroupAt& at, int64_t lane) {
  const uint8_t* own = at.head + lane * w.scale_bytes();
  const float scale = w.scale == Scale::F32 ? word<float>(own) : (w.scale == Scale::F16 ? from_f16 : from_bf16)(word<uint16_t>(own));
  if (w.zeros()) return {scale, float(at.head[kPanel * w.scale_bytes() + lane]), 0};
  if (w.fmt == Fmt::K6) return {scale * float(int8_t(at.head[kPanel * (2 + at.index) + lane])), 32, 0};
  if (w.fmt == Fmt::K4) {
    const int64_t span = at.index / 4, byte = lane * 4 + at.index % 4;
    const int both = at.head[kPanel * (4 + 4 * span) + byte], high = at.head[kPanel * 12 + byte] >> 4 * span;
    const int size = (both & 15) | (high & 3) << 4, low = both >> 4 | (high >> 2 & 3) << 4;
    return {scale * float(size), 0, from_f16(word<uint16_t>(at.head + (kPanel + lane) * 2)) * float(low)};
  }
  return {scale, w.fmt == Fmt::I8 ? 128.0f : w.fmt == Fmt::I4 ? 8.0f : 0.0f, 0};
}

// Code j of a row in one group, as the number it stands for.
float number(const Weight& w, const GroupAt& at, int64_t lane, int64_t j) {
  if (w.fmt == Fmt::FP8) {
    const uint32_t code = at.codes[j / 2 * 64 + e4m3_at(lane) + j % 2];
    const float size = (code & 127) == 127 ? NAN : std::bit_cast<float>((code & 127) << 20) * 0x1p120f;
    return code & 128 ? -size : size;
  }
  if (w.wide()) return at.codes[(j / 4 * kPanel + lane) * 4 + j % 4];
  if (w.fmt == Fmt::K6) {
    const SixAt six = six_at(lane, j);
    const uint8_t* own = at.codes + six.byte;
    return float(six.part < 3 ? own[six.part * 64] & 63 : own[0] >> 6 | own[64] >> 6 << 2 | own[128] >> 6 << 4);
  }
  const int nibble = (at.codes[j / 4 * 64 + lane % 16 * 4 + j % 4] >> (lane < 16 ? 0 : 4)) & 15;
  constexpr int8_t levels[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  return float(w.fmt == Fmt::MX4 ? levels[nibble] : nibble);
}

}  // namespace

namespace {
constexpr size_t kHuge = 2 << 20;

// Maps at a multiple of a huge page, as the file's start is one: nowhere else could its cache be had in huge pages. With
// pages of 4 KiB a step that reads small matrices takes up to a fifth longer.
uint8_t* mapped(size_t bytes, int protection, int flags, int file) {
  const size_t end = (bytes + 4095) / 4096 * 4096, slack = bytes < kHuge ? 0 : kHuge;
  void* room = mmap(nullptr, end + slack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (room == MAP_FAILED) return nullptr;
  uint8_t *from = static_cast<uint8_t*>(room), *at = from + (slack ? kHuge - reinterpret_cast<uintptr_t>(room) % kHuge : 0);
  if (at > from) munmap(from, size_t(at - from));
  if (from + slack > at) munmap(at + end, size_t(from + slack - at));
  if (mmap(at, bytes, protection, flags | MAP_FIXED, file, 0) == MAP_FAILED) {
    const int why = errno;
    munmap(at, end);
    errno = why;
    return nullptr;
  }
  if (slack) madvise(at, bytes, MADV_HUGEPAGE);
  return at;
}
}  // namespace

Memory::Memory(int64_t bytes) : size_(std::max<int64_t>(bytes, 1)) {
  data_ = mapped(size_t(size_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
  if (!data_) throw std::bad_alloc();
}
Memory::Memory(int file, int64_t bytes, bool writable) : size_(bytes), writable_(writable) {
  data_ = mapped(size_t(size_), PROT_READ | (writable ? PROT_WRITE : 0), MAP_SHARED, file);
  if (!data_) throw std::system_error(errno, std::generic_category(), "mapping a file of packed weights");
  if (!writable) madvise(data_, size_t(size_), MADV_WILLNEED);
}
Memory::~Memory() {
  if (data_) munmap(data_, size_t(size_));
}
Memory::Memory(Memory&& other) noexcept { *this = std::move(other); }
Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(writable_, other.writable_);
  return *this;
}

Weight weight_layout(const Format& format, int64_t n, int64_t k, int64_t group, bool glu) {
  const Fmt fmt = format.fmt;
  const bool coded = fmt >= Fmt::I8;
  const int64_t block = groups_of_block(fmt);
  if (n < 1 || k < 1 || (glu && n % 2)) throw std::invalid_argument("a weight needs rows and columns, and even rows for glu");
  if (block > 1 && (group * block != kBlock || k % kBlock))
    throw std::invalid_argument("rows of q4_k and q6_k are blocks of 256 values in groups of 32 and 16");
  if (coded && block == 1 && (group < 32 || group > kMaxGroup || group % 32))
    throw std::invalid_argument("group must be a multiple of 32 in 32..1024");
  Weight w{fmt, format.scale, n, k, coded ? group : 0, glu, format.row, 0, 0, 0, nullptr};
  const int64_t align = coded ? group : fmt == Fmt::BF16 ? 2 : 1;
  w.padded_k = (k + align - 1) / align * align;
  w.panels = (w.half() + kPanel - 1) / kPanel * (glu ? 2 : 1);
  w.panel_bytes = coded ? w.padded_k / (group * block) * w.block_bytes() : w.padded_k * kPanel * (fmt == Fmt::F32 ? 4 : 2);
  return w;
}

void pack_rows(const Weight& w, const void* rows, Source type, int64_t first, int64_t count, int64_t begin, int64_t end,
               const Kernels& kernels) {
  const int64_t stride = w.k * (type == Source::F32 ? 4 : 2);
  for (int64_t panel = begin; panel < end; panel++) {
    const Held h = held_by(w, panel, first, count);
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

void pack_coded(const Weight& w, const CodedRows& rows, int64_t first, int64_t count, int64_t begin, int64_t end) {
  const int64_t groups = (w.k + w.group - 1) / w.group;
  std::vector<uint8_t> own(size_t(kPanel * w.group));  // what lies beyond a row meets zeros of x: any code will do
  for (int64_t panel = begin; panel < end; panel++) {
    const Held h = held_by(w, panel, first, count);
    const Strip s{nullptr, 0, Source::F32, panel, h.lane, h.lanes};
    for (int64_t g = 0; g < groups && h.lanes > 0; g++) {
      const int64_t held = std::min(w.group, w.k - g * w.group);
      for (int64_t i = 0; i < s.lanes; i++) {
        put_head(w, s.lane + i, group_at(w, panel, g), h.at + i, g, rows);
        std::memcpy(own.data() + i * w.group, rows.codes + (h.at + i) * w.k + g * w.group, size_t(held));
      }
      lay_codes(w, s, g, own.data(), w.group);
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
        const Step step = step_of(w, at, lane);
        for (int64_t j = 0; j < std::min(w.group, w.k - g * w.group); j++)
          out[g * w.group + j] = (number(w, at, lane, j) - step.zero) * step.scale - step.low;
      }
  }
}

}  // namespace intaglio
