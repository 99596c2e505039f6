#include "pack.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>
#include <system_error>
#include <utility>
#include <vector>

namespace intaglio {

namespace {

float from_bf16(uint16_t h) { return std::bit_cast<float>(uint32_t(h) << 16); }
uint16_t to_bf16(float f) {
  const uint32_t u = std::bit_cast<uint32_t>(f), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return uint16_t((u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 0x40 : rounded);
}
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

struct GroupAt {  // where a row's codes and scale of one group stand
  uint8_t* scales;
  uint8_t* codes;
};
GroupAt group_at(const Weight& w, int64_t panel, int64_t g) {
  int64_t bytes = 2 * kPanel + w.group / 4 * (w.fmt == Fmt::I8 ? 128 : 64);
  uint8_t* at = w.data + panel * w.panel_bytes + g * bytes;
  return {at, at + 2 * kPanel};
}

constexpr int64_t kMaxGroup = 1024;

// A group's codes above `floor`, from 0 on, and its scale in bf16; the choice is formats.quantise()'s: the scale is rounded
// first, codes are to nearest even against it. Columns of 8 keep the loops free of any order that would stop a compiler.
uint16_t quantise(const float* x, int64_t group, bool wide, uint8_t* codes) {
  constexpr int64_t step = 8;
  float lows[step], highs[step];
  std::copy(x, x + step, lows), std::copy(x, x + step, highs);
  for (int64_t i = step; i < group; i += step)
    for (int64_t j = 0; j < step; j++) {
      lows[j] = x[i + j] < lows[j] ? x[i + j] : lows[j];
      highs[j] = x[i + j] > highs[j] ? x[i + j] : highs[j];
    }
  const float low = *std::min_element(lows, lows + step), high = *std::max_element(highs, highs + step);
  const float raw = wide ? std::max(-low, high) / 127.0f : (-low >= high ? low : high) / -8.0f;
  const uint16_t scale = std::max(-low, high) < kTiny ? 0 : to_bf16(raw);
  const float inverse = scale != 0 ? 1.0f / from_bf16(scale) : 0.0f;
  const float floor = wide ? -127.0f : -8.0f, ceil = wide ? 127.0f : 7.0f;
  const int32_t offset = wide ? 128 : 8;
  for (int64_t i = 0; i < group; i++) {
    float v = x[i] * inverse;
    v = v == v ? v : 0.0f;
    v = v > floor ? v : floor;
    v = v < ceil ? v : ceil;
    codes[i] = uint8_t(std::bit_cast<int32_t>(v + 0x1.8p23f) + offset);  // whose last bits are v, rounded
  }
  return scale;
}

// Codes of rows [0, lanes) of group g, `stride` apart, to where the strip has them.
void lay_codes(const Weight& w, const Strip& s, int64_t g, const uint8_t* codes, int64_t stride) {
  static_assert(kPanel == 32);
  uint8_t* to = group_at(w, s.panel, g).codes;
  if (w.fmt == Fmt::I8)
    return transpose(codes, stride, s.lanes, w.group / 4, reinterpret_cast<uint32_t*>(to) + s.lane, kPanel);
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

void pack_codes(const Weight& w, const Strip& s) {
  alignas(64) uint8_t codes[kPanel * kMaxGroup];
  alignas(64) float x[kMaxGroup];
  const int64_t each = s.type == Source::F32 ? 4 : 2;
  for (int64_t g = 0; g * w.group < w.k; g++) {
    const int64_t count = std::min(w.group, w.k - g * w.group);
    std::fill(x + count, x + w.group, 0.0f);
    auto scales = reinterpret_cast<uint16_t*>(group_at(w, s.panel, g).scales);
    for (int64_t i = 0; i < s.lanes; i++) {
      const uint8_t* row = s.row(i) + g * w.group * each;
      for (int64_t b = 0; b < w.group * each; b += 64) __builtin_prefetch(row + kAhead + b);
      widen(row, s.type, count, x);
      scales[s.lane + i] = quantise(x, w.group, w.fmt == Fmt::I8, codes + i * w.group);
    }
    lay_codes(w, s, g, codes, w.group);
  }
}

}  // namespace

Memory::Memory(int64_t bytes) : size_(std::max<int64_t>(bytes, 1)) {
  void* p = mmap(nullptr, size_t(size_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  if (size_ >= (4 << 20)) madvise(p, size_t(size_), MADV_HUGEPAGE);
  data_ = static_cast<uint8_t*>(p);
}
Memory::Memory(int file, int64_t offset, int64_t bytes, bool writable) : size_(bytes), writable_(writable) {
  void* p = mmap(nullptr, size_t(size_), PROT_READ | (writable ? PROT_WRITE : 0), MAP_SHARED, file, offset);
  if (p == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mapping a file of packed weights");
  madvise(p, size_t(size_), MADV_HUGEPAGE);
  if (!writable) madvise(p, size_t(size_), MADV_WILLNEED);
  data_ = static_cast<uint8_t*>(p);
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

Weight weight_layout(Fmt fmt, int64_t n, int64_t k, int64_t group, bool glu) {
  const bool coded = fmt == Fmt::I8 || fmt == Fmt::I4;
  if (n < 1 || k < 1 || (glu && n % 2)) throw std::invalid_argument("a weight needs rows and columns, and even rows for glu");
  if (coded && (group < 32 || group > 1024 || group % 32))
    throw std::invalid_argument("group must be a multiple of 32 in 32..1024");
  Weight w{fmt, n, k, coded ? group : 0, glu, 0, 0, 0, nullptr};
  int64_t align = coded ? group : fmt == Fmt::BF16 ? 2 : 1;
  w.padded_k = (k + align - 1) / align * align;
  w.panels = (w.half() + kPanel - 1) / kPanel * (glu ? 2 : 1);
  int64_t groups = coded ? w.padded_k / group : 0;
  switch (fmt) {
    case Fmt::F32: w.panel_bytes = w.padded_k * kPanel * 4; break;
    case Fmt::F16:
    case Fmt::BF16: w.panel_bytes = w.padded_k * kPanel * 2; break;
    case Fmt::I8: w.panel_bytes = groups * (2 * kPanel + group * kPanel); break;
    case Fmt::I4: w.panel_bytes = groups * (2 * kPanel + group * kPanel / 2); break;
  }
  return w;
}

void pack_rows(const Weight& w, const void* rows, Source type, int64_t first, int64_t count, int64_t begin, int64_t end) {
  const int64_t stride = w.k * (type == Source::F32 ? 4 : 2);
  for (int64_t panel = begin; panel < end; panel++) {
    const int64_t top = w.glu ? panel / 2 * kPanel + panel % 2 * w.half() : panel * kPanel;  // its first row
    const int64_t bottom = std::min(top + kPanel, w.glu && panel % 2 == 0 ? w.half() : w.n);
    const int64_t from = std::max(top, first), to = std::min(bottom, first + count);
    if (from >= to) continue;
    Strip s{static_cast<const uint8_t*>(rows) + (from - first) * stride, stride, type, panel, from - top, to - from};
    w.group ? pack_codes(w, s) : pack_plain(w, s);
  }
}

void unpack_row(const Weight& w, int64_t row, float* out) {
  const int64_t panel = w.panel_of(row), lane = w.lane_of(row);
  const uint8_t* base = w.data + panel * w.panel_bytes;
  for (int64_t i = 0; i < w.k; i++) switch (w.fmt) {
      case Fmt::F32: out[i] = reinterpret_cast<const float*>(base)[i * kPanel + lane]; break;
      case Fmt::F16: out[i] = from_f16(reinterpret_cast<const uint16_t*>(base)[i * kPanel + lane]); break;
      case Fmt::BF16:
        out[i] = from_bf16(reinterpret_cast<const uint16_t*>(base)[(i / 2 * kPanel + lane) * 2 + i % 2]);
        break;
      case Fmt::I8:
      case Fmt::I4: {
        int64_t g = i / w.group, j = i % w.group;
        GroupAt at = group_at(w, panel, g);
        float scale = from_bf16(reinterpret_cast<const uint16_t*>(at.scales)[lane]);
        int code = w.fmt == Fmt::I8 ? int(at.codes[(j / 4 * kPanel + lane) * 4 + j % 4]) - 128
                                    : ((at.codes[j / 4 * 64 + lane % 16 * 4 + j % 4] >> (lane < 16 ? 0 : 4)) & 15) - 8;
        out[i] = float(code) * scale;
      }
    }
}

}  // namespace intaglio
