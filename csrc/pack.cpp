#include "pack.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

namespace intaglio {

namespace {

float from_bf16(uint16_t h) { return std::bit_cast<float>(uint32_t(h) << 16); }
uint16_t to_bf16(float f) {
  uint32_t u = std::bit_cast<uint32_t>(f);
  if ((u & 0x7fffffff) > 0x7f800000) return uint16_t((u >> 16) | 0x40);
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
float from_f16(uint16_t h) { return float(std::bit_cast<_Float16>(h)); }
uint16_t to_f16(float f) { return std::bit_cast<uint16_t>(_Float16(f)); }

void widen(const void* row, Source type, int64_t k, float* out) {
  auto half = (const uint16_t*)row;
  switch (type) {
    case Source::F32: std::memcpy(out, row, size_t(k) * 4); break;
    case Source::F16: for (int64_t i = 0; i < k; i++) out[i] = from_f16(half[i]); break;
    case Source::BF16: for (int64_t i = 0; i < k; i++) out[i] = from_bf16(half[i]); break;
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

// The choice of codes is formats.quantise()'s: scale first rounded to bf16, codes to nearest even against it.
void pack_group(const Weight& w, const float* x, int64_t count, int64_t panel, int64_t lane, int64_t g) {
  float low = x[0], high = x[0];
  if (count < w.group) low = std::min(low, 0.0f), high = std::max(high, 0.0f);
  for (int64_t i = 0; i < count; i++) low = std::min(low, x[i]), high = std::max(high, x[i]);
  const bool wide = w.fmt == Fmt::I8;
  float raw = wide ? std::max(-low, high) / 127.0f : (-low >= high ? low : high) / -8.0f;
  float scale = std::max(-low, high) < kTiny ? 0.0f : from_bf16(to_bf16(raw)), inverse = scale != 0 ? 1.0f / scale : 0.0f;
  float floor = wide ? -127.0f : -8.0f, ceil = wide ? 127.0f : 7.0f;
  GroupAt at = group_at(w, panel, g);
  reinterpret_cast<uint16_t*>(at.scales)[lane] = to_bf16(scale);
  for (int64_t i = 0; i < w.group; i++) {
    float v = i < count ? std::clamp(std::nearbyintf(x[i] * inverse), floor, ceil) : 0.0f;
    int code = std::isnan(v) ? 0 : int(v);
    if (wide) {
      at.codes[(i / 4 * kPanel + lane) * 4 + i % 4] = uint8_t(code + 128);
    } else {
      uint8_t& byte = at.codes[i / 4 * 64 + lane % 16 * 4 + i % 4];
      byte = lane < 16 ? uint8_t((byte & 0xf0) | (code + 8)) : uint8_t((byte & 0x0f) | ((code + 8) << 4));
    }
  }
}

void pack_row(const Weight& w, const float* x, int64_t panel, int64_t lane) {
  uint8_t* base = w.data + panel * w.panel_bytes;
  switch (w.fmt) {
    case Fmt::F32:
      for (int64_t i = 0; i < w.k; i++) reinterpret_cast<float*>(base)[i * kPanel + lane] = x[i];
      break;
    case Fmt::F16:
      for (int64_t i = 0; i < w.k; i++) reinterpret_cast<uint16_t*>(base)[i * kPanel + lane] = to_f16(x[i]);
      break;
    case Fmt::BF16:
      for (int64_t i = 0; i < w.k; i++)
        reinterpret_cast<uint16_t*>(base)[(i / 2 * kPanel + lane) * 2 + i % 2] = to_bf16(x[i]);
      break;
    case Fmt::I8:
    case Fmt::I4:
      for (int64_t g = 0; g * w.group < w.k; g++)
        pack_group(w, x + g * w.group, std::min(w.group, w.k - g * w.group), panel, lane, g);
      break;
  }
}

// bf16 to bf16 for a whole panel: pairs move as they are, a cache line of each row at a time.
void pack_pairs(const Weight& w, const uint16_t* rows, int64_t panel) {
  auto out = reinterpret_cast<uint32_t*>(w.data + panel * w.panel_bytes);
  int64_t pairs = w.k / 2;
  for (int64_t i = 0; i < pairs; i += 16)
    for (int64_t lane = 0; lane < kPanel; lane++) {
      uint32_t line[16];
      int64_t n = std::min<int64_t>(16, pairs - i);
      std::memcpy(line, rows + lane * w.k + i * 2, size_t(n) * 4);
      for (int64_t j = 0; j < n; j++) out[(i + j) * kPanel + lane] = line[j];
    }
  if (w.k % 2)
    for (int64_t lane = 0; lane < kPanel; lane++) out[pairs * kPanel + lane] = rows[lane * w.k + w.k - 1];
}

}  // namespace

Memory::Memory(int64_t bytes) : size_(std::max<int64_t>(bytes, 1)) {
  void* p = mmap(nullptr, size_t(size_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  if (size_ >= (4 << 20)) madvise(p, size_t(size_), MADV_HUGEPAGE);
  data_ = static_cast<uint8_t*>(p);
}
Memory::~Memory() {
  if (data_) munmap(data_, size_t(size_));
}
Memory::Memory(Memory&& other) noexcept { *this = std::move(other); }
Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
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
  const int64_t bytes = w.k * (type == Source::F32 ? 4 : 2);
  auto at = [&](int64_t row) { return static_cast<const uint8_t*>(rows) + (row - first) * bytes; };
  std::vector<float> x(size_t(w.k));
  for (int64_t row = first; row < first + count;) {
    int64_t panel = w.panel_of(row);
    if (panel < begin || panel >= end) {
      row++;
      continue;
    }
    bool whole = w.lane_of(row) == 0 && row + kPanel <= first + count && w.panel_of(row + kPanel - 1) == panel &&
                 w.lane_of(row + kPanel - 1) == kPanel - 1;
    if (whole && type == Source::BF16 && w.fmt == Fmt::BF16) {
      pack_pairs(w, reinterpret_cast<const uint16_t*>(at(row)), panel);
      row += kPanel;
      continue;
    }
    widen(at(row), type, w.k, x.data());
    pack_row(w, x.data(), panel, w.lane_of(row));
    row++;
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
