// The matrix product, and the quantisation of its activations. Each result is one chain of additions over K in ascending order (of
// single values, bf16 pairs, or exact integer sums of groups), so its bits do not depend on tiling, batch or number of threads.
// Long because each format's loads, tile and outer loop must be inlined into one another.

// GCC keeps accumulators in registers only if every loop over them is unrolled; -O3 alone does not do so.
#define EACH_OF _Pragma("GCC unroll 32")

// Each of these reads one weight format: `step` values of K at a time, `bytes` for each row of the weight and step.
struct F32Weights {
  using X = float;
  static constexpr int step = 1, bytes = 4;
  using W = F;
  static W load_w(const uint8_t* p) { return load((const float*)p); }
  static F dot(F acc, W w, const X* x) { return fma(w, set(x[0]), acc); }
};
struct F16Weights : F32Weights {
  static constexpr int bytes = 2;
  static W load_w(const uint8_t* p) { return load_f16((const uint16_t*)p); }
};
struct Bf16Weights {  // activations stay float32
  using X = float;
  static constexpr int step = 2, bytes = 4;
  using W = I;
  static W load_w(const uint8_t* p) { return load_raw(p); }
  static F dot(F acc, W w, const X* x) { return fma(odd_bf16(w), set(x[1]), fma(even_bf16(w), set(x[0]), acc)); }
};
struct Bf16Pairs {  // activations rounded to bf16: the dot-product instruction
  using X = uint16_t;
  static constexpr int step = 2, bytes = 4;
  using W = I;
  static W load_w(const uint8_t* p) { return load_raw(p); }
  static F dot(F acc, W w, const X* x) {
    uint32_t pair;
    std::memcpy(&pair, x, 4);
    return dot_bf16(acc, w, pair);
  }
};

constexpr int kVectors = kPanel / F::N, kHalf = kVectors / 2;  // vectors across a panel, and across its first 16 rows
// Rows of x in a tile, whose accumulators fill the registers: one for each element; for codes an integer and a float one.
constexpr int kFloatRows = F::N == 16 ? 12 : 3, kCodeRows = F::N == 16 ? 6 : 3;
inline int tile_rows(const Weight& w) { return w.integer() ? kCodeRows : kFloatRows; }

// Products by the matrix unit, for the instruction set that has one: amx.inl.
constexpr int64_t kMatrixPass = 32;  // rows of x in a pass
bool uses_matrix_unit(const Weight& w, bool x_bf16, int64_t rows);  // rows: of the whole product
int64_t matrix_step(const Weight& w);  // values of K that an instruction multiplies
// Writes row number `lane` of a pass of `height` rows.
void matrix_bf16_row(const Weight& w, const float* x, int64_t height, uint16_t* pass, int64_t lane);
void matrix_panels(const LinearArgs& a, int64_t first_row, int64_t rows, const uint8_t* panel, int64_t panels, float* tile);

// Prefetching of the weights after the current block: each pass over the block fetches a part of them.
struct NextBlock {
  const uint8_t* at;
  int64_t step;
  [[gnu::always_inline]] void fetch(int64_t i) const {  // GCC drops a call that only prefetches unless it is inlined
    __builtin_prefetch(at + i * step, 0, 2);
    if (step > 64) __builtin_prefetch(at + i * step + 64, 0, 2);
  }
};

// Prefetching for one or two rows, where the hardware prefetcher alone falls behind: bytes kReach after those read now, into L1.
// On one Zen 5 core, of 40 GB/s it gets 16 to 20 of K4, K5 and K6, whose heads interrupt the stream of codes, and 32 of FP8; formats
// without scales need none. On two cores of an Intel Xeon 6 it gets 25 of 37 GB/s of BF16; there, 1 to 3 KiB ahead are best for all.
bool is_intel() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}
const bool kIntel = is_intel();
const int64_t kReach = kIntel ? 1536 : 8192;
[[gnu::always_inline]] inline void fetch_far(const uint8_t* p, int64_t bytes) {
  EACH_OF for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + kReach + i, 0, 3);
}

template <class T, int MR>
void float_tile(const uint8_t* w, const typename T::X* x, int64_t steps, float* c, bool first, NextBlock ahead) {
  F acc[MR][kVectors];
  EACH_OF for (int m = 0; m < MR; m++)
    EACH_OF for (int v = 0; v < kVectors; v++) acc[m][v] = first ? set(0) : load(c + m * kPanel + v * F::N);
  for (int64_t s = 0; s < steps; s++) {
    typename T::W row[kVectors];
    if constexpr (MR > 2) ahead.fetch(s);
    else if (kIntel) fetch_far(w + s * kPanel * T::bytes, kPanel * T::bytes);
    EACH_OF for (int v = 0; v < kVectors; v++) row[v] = T::load_w(w + (s * kPanel + v * F::N) * T::bytes);
    EACH_OF for (int m = 0; m < MR; m++)
      EACH_OF for (int v = 0; v < kVectors; v++) acc[m][v] = T::dot(acc[m][v], row[v], x + (s * MR + m) * T::step);
  }
  EACH_OF for (int m = 0; m < MR; m++)
    EACH_OF for (int v = 0; v < kVectors; v++) store(c + m * kPanel + v * F::N, acc[m][v]);
}

// Floats of E4M3 codes, one in each word.
inline F small_floats(I code) {
  return even_bf16(left<4>(code & set_int(127)) | left<8>(code & set_int(128))) * set(0x1p120f);
}

// Reads integer codes; MR rows of x at a time. With few rows, unpacking the codes is the bottleneck, so two nibbles are
// multiplied together and their sums separated afterwards (`halves`), and the loop is unrolled. With more rows or fewer
// registers unrolling only causes spills.
template <Fmt Format, int MR>
struct Codes {
  static constexpr bool few = F::N == 16 && MR <= 4;
  static constexpr bool halves = few && (Format == Fmt::I4 || Format == Fmt::U4 || Format == Fmt::A4 || Format == Fmt::K4);
  static constexpr bool levelled = Format == Fmt::MX4 || Format == Fmt::NV4;  // codes are indices of kLevels
  static constexpr bool affine = Format == Fmt::A8 || Format == Fmt::A4, minima = affine || Format == Fmt::K4 || Format == Fmt::K5;
  static constexpr bool wide = Format == Fmt::I8 || Format == Fmt::U8 || Format == Fmt::A8, zeros = Format == Fmt::U8 || Format == Fmt::U4;
  static constexpr int quads = Format == Fmt::K6 ? 2 : Format == Fmt::K5 ? 4 : 1;  // groups of four values of K that load_w() reads at once
  static constexpr int unrolled = !few ? quads : Format == Fmt::K6 || Format == Fmt::NV4 ? 4 : 8;
  static constexpr int bytes = wide ? 128 : Format == Fmt::K6 ? 192 : Format == Fmt::K5 ? 320 : 64;  // of a panel's codes for these quads
  // Sums of words: K4 and K5 add the products of so many values of K before they could overflow: 2 * 15 * 127 * 8, 2 * 31 * 127 * 4.
  static constexpr bool words = kWordSums && (Format == Fmt::K4 || Format == Fmt::K5);
  static constexpr int run = Format == Fmt::K5 && words ? 16 : kBlock / int(groups_of_block(Format));
  // Codes are stored plus this offset. A group's sum starts at -offset * (sum of x), which cancels it. With zero points or
  // minima the factor differs by row of the weight, and the offset here is 1.
  static constexpr int offset = Format == Fmt::I8 ? kOffset8 : Format == Fmt::I4 ? 8 : levelled ? 12 : Format == Fmt::K6 ? 32 : 1;
  // Vector v < kHalf of these quads, and the vector kHalf after it: that of the rows 16 further on.
  static void load_w(const uint8_t* p, int v, I w[quads][2]) {
    p += v * F::N * 4;
    const I a = load_raw(p);
    if constexpr (wide) {
      w[0][0] = a, w[0][1] = load_raw(p + kHalf * F::N * 4);
    } else if constexpr (Format == Fmt::K6) {
      const I b = load_raw(p + 64), c = load_raw(p + 128), six = set_int(0x3f3f3f3f);
      w[0][0] = a & six, w[0][1] = b & six, w[1][0] = c & six;
      w[1][1] = (right<6>(a) & set_int(0x03030303)) | (right<4>(b) & set_int(0x0c0c0c0c)) | (right<2>(c) & set_int(0x30303030));
    } else if constexpr (Format == Fmt::K5) {
      const I b = load_raw(p + 64), c = load_raw(p + 128), d = load_raw(p + 192), high = load_raw(p + 256);
      const I four = set_int(0x0f0f0f0f), fifth = set_int(0x10101010);
      w[0][0] = (a & four) | (left<4>(high) & fifth), w[0][1] = (right<4>(a) & four) | (left<3>(high) & fifth);
      w[1][0] = (b & four) | (left<2>(high) & fifth), w[1][1] = (right<4>(b) & four) | (left<1>(high) & fifth);
      w[2][0] = (c & four) | (high & fifth), w[2][1] = (right<4>(c) & four) | (right<1>(high) & fifth);
      w[3][0] = (d & four) | (right<2>(high) & fifth), w[3][1] = (right<4>(d) & four) | (right<3>(high) & fifth);
    } else {
      (levelled ? levels : halves ? joined_nibbles : nibbles)(a, w[0][0], w[0][1]);
    }
  }
  static I dot(I acc, I w, int32_t quad) {
    if constexpr (wide) return dot_u8(acc, w, quad);
    if constexpr (words) return dot_words(acc, w, quad);
    return dot_u6(acc, w, quad);
  }
  // Initial value of a group's sum. `start`: -offset * (sum of x).
  static I begin(const uint8_t* head, int64_t scale_bytes, int v, int32_t start) {
    if constexpr (zeros) {
      const I zero = load_u8(head + kPanel * scale_bytes + v * F::N);
      return set_int(start) * (wide ? zero + set_int(kOffset8 - 128) : zero);
    }
    return set_int(!minima ? start : wide ? start * (kOffset8 - 128) : 0);
  }
  // Scales of a group, or minima stored as scales are; `factors`: those of the panel's rows, where the format has them.
  static void scales(const uint8_t* from, Scale kept, const float* factors, F* ws) {
    EACH_OF for (int v = 0; v < kVectors; v++)
      if constexpr (Format == Fmt::NV4) ws[v] = small_floats(load_u8(from + v * F::N)) * load(factors + v * F::N);
      else if (kept == Scale::BF16) ws[v] = load_bf16((const uint16_t*)from + v * F::N);
      else if (kept == Scale::F16) ws[v] = load_f16((const uint16_t*)from + v * F::N);
      else ws[v] = load((const float*)from + v * F::N);
  }
  // Turns the accumulators of row m into the group's sum, where sum_group() left joined halves that did not start at begin().
  static void settle(I (&acc)[MR][kVectors], const uint8_t* head, int64_t scale_bytes, int m, int32_t start) {
    if constexpr (halves) {
      EACH_OF for (int v = 0; v < kVectors / 2; v++) part_joined(acc[m][v], acc[m][v + kVectors / 2]);
      if constexpr (!minima)
        EACH_OF for (int v = 0; v < kVectors; v++) acc[m][v] = acc[m][v] + begin(head, scale_bytes, v, start);
    }
  }
};

template <int MR>
using Sums = I[MR][kVectors];

// acc[m][v] += the exact sum of products of a group's codes with x. Advances both pointers past the group.
template <Fmt Format, int MR>
[[gnu::always_inline]] inline void sum_group(const uint8_t*& codes, const int8_t*& x, int64_t group, Sums<MR>& acc, NextBlock& ahead) {
  using T = Codes<Format, MR>;
  constexpr int unrolled = T::unrolled;
  constexpr bool twice = F::N == 16 && MR == 1;  // two accumulators alone are bound by latency, so odd quads use a second pair
  Sums<twice ? MR : 1> others;
  if constexpr (twice)
    EACH_OF for (int m = 0; m < MR; m++)
      EACH_OF for (int v = 0; v < kVectors; v++) others[m][v] = set_int(0);
  for (int64_t at = 0; at < group; at += 4 * unrolled, x += 4 * unrolled * MR, codes += unrolled / T::quads * T::bytes) {
    EACH_OF for (int q = 0; q < unrolled; q += T::quads) {
      EACH_OF for (int v = 0; v < kHalf; v++) {
        I w[T::quads][2];
        T::load_w(codes + q / T::quads * T::bytes, v, w);
        if constexpr (MR <= 2)
          if (v == 0) fetch_far(codes + q / T::quads * T::bytes, T::bytes);
        EACH_OF for (int j = 0; j < T::quads; j++) {
          if constexpr (MR > 2)
            if (v == 0) ahead.fetch(q + j);
          EACH_OF for (int m = 0; m < MR; m++) {
            int32_t quad;
            std::memcpy(&quad, x + ((q + j) * MR + m) * 4, 4);
            EACH_OF for (int h = 0; h < 2; h++) {
              I& sum = twice && (q + j) % 2 ? others[twice ? m : 0][v + h * kHalf] : acc[m][v + h * kHalf];
              sum = T::dot(sum, w[j][h], quad);
            }
          }
        }
      }
    }
    ahead.at += unrolled * ahead.step;
  }
  if constexpr (twice)
    EACH_OF for (int m = 0; m < MR; m++)
      EACH_OF for (int v = 0; v < kVectors; v++) acc[m][v] = acc[m][v] + others[m][v];
}

// Tile for formats with float scales. A group's integer sum is exact; it is scaled and added over the `parts` groups of a
// span, then multiplied by the span's scale of x. Both sums stay in registers: storing the tile after every group of 32
// would cost a third of the speed.
template <Fmt Format, int MR>
void code_tile(const Weight& w, const float* factors, const uint8_t* from, const int8_t* x, const float* scales, const int32_t* starts, int64_t groups, float* c, bool first, NextBlock ahead) {
  using T = Codes<Format, MR>;
  const int64_t group = w.group, parts = w.parts(), scale_bytes = w.scale_bytes(), head_bytes = w.head_bytes();
  for (int64_t g = 0; g < groups; g += parts, scales += MR) {
    F sums[MR][kVectors];
    EACH_OF for (int m = 0; m < MR; m++)
      EACH_OF for (int v = 0; v < kVectors; v++) sums[m][v] = set(0);
    for (int64_t p = g; p < std::min(groups, g + parts); p++, starts += MR) {
      const uint8_t* head = from;
      from += head_bytes;
      Sums<MR> acc;
      EACH_OF for (int m = 0; m < MR; m++)
        EACH_OF for (int v = 0; v < kVectors; v++) acc[m][v] = T::halves ? set_int(0) : T::begin(head, scale_bytes, v, starts[m]);
      sum_group<Format, MR>(from, x, group, acc, ahead);
      F ws[kVectors];
      T::scales(head, w.scale, factors, ws);
      EACH_OF for (int m = 0; m < MR; m++) {
        T::settle(acc, head, scale_bytes, m, starts[m]);
        EACH_OF for (int v = 0; v < kVectors; v++) sums[m][v] = fma(to_float(acc[m][v]), ws[v], sums[m][v]);
      }
      if constexpr (T::affine) {  // a start is -(sum of x)
        T::scales(head + kPanel * scale_bytes, w.scale, factors, ws);
        EACH_OF for (int m = 0; m < MR; m++)
          EACH_OF for (int v = 0; v < kVectors; v++) sums[m][v] = fma(set(float(starts[m])), ws[v], sums[m][v]);
      }
    }
    EACH_OF for (int m = 0; m < MR; m++)
      EACH_OF for (int v = 0; v < kVectors; v++) {
        float* to = c + m * kPanel + v * F::N;
        store(to, fma(sums[m][v], set(scales[m]), first && g == 0 ? set(0) : load(to)));
      }
  }
}

// Scales and minima (6 bits each) of the four groups of a K4 or K5 span, one byte each.
inline void span_fields(const uint8_t* head, int64_t span, int v, I& sizes, I& lows) {
  const I low = load_raw(head + kPanel * (4 + 4 * span) + v * F::N * 4), both = load_raw(head + kPanel * 12 + v * F::N * 4);
  const I high = span ? right<4>(both) : both, four = set_int(0x0f0f0f0f), two = set_int(0x30303030);
  sizes = (low & four) | (left<4>(high) & two);
  lows = (right<4>(low) & four) | (left<2>(high) & two);
}

// Tile for K4, K5 and K6, whose groups have integer scales: the sum of a span of 128 values is one exact integer, and so is
// the sum of its minima. Where a group's sum is of 16-bit words, it is scaled and added every T::run values, before it overflows.
template <Fmt Format, int MR>
void block_tile(const Weight& w, const float*, const uint8_t* from, const int8_t* x, const float* scales, const int32_t* starts, int64_t groups, float* c, bool first, NextBlock ahead) {
  using T = Codes<Format, MR>;
  constexpr int64_t block = groups_of_block(Format), group = kBlock / block, parts = kSpan / group, run = T::run;
  const uint8_t *head = from, *codes = from;
  for (int64_t g = 0; g < groups; g += parts, scales += MR, starts += parts * MR) {
    if (g % block == 0) {
      head = codes, codes += w.head_bytes();
      if constexpr (MR <= 2) fetch_far(head, kPanel * (T::minima ? 16 : 18));
    }
    Sums<MR> sums;
    I sizes[kVectors], lows[kVectors];
    EACH_OF for (int v = 0; v < kVectors; v++) {
      if constexpr (T::minima) span_fields(head, g % block / parts, v, sizes[v], lows[v]);
      EACH_OF for (int m = 0; m < MR; m++) sums[m][v] = set_int(0);
    }
    for (int64_t p = 0; p < parts; p++) {
      I size[kVectors];
      EACH_OF for (int v = 0; v < kVectors; v++) {
        if constexpr (T::minima) size[v] = sizes[v] & set_int(63), sizes[v] = right<8>(sizes[v]);
        else size[v] = load_i8((const int8_t*)head + kPanel * (2 + g % block + p) + v * F::N);
      }
      EACH_OF for (int64_t at = 0; at < group; at += run) {
        Sums<MR> acc;
        EACH_OF for (int m = 0; m < MR; m++)
          EACH_OF for (int v = 0; v < kVectors; v++) acc[m][v] = T::minima ? set_int(0) : set_int(starts[p * MR + m]);
        sum_group<Format, MR>(codes, x, run, acc, ahead);
        EACH_OF for (int m = 0; m < MR; m++) {
          T::settle(acc, head, 0, m, 0);
          EACH_OF for (int v = 0; v < kVectors; v++) sums[m][v] = T::words ? add_scaled(sums[m][v], acc[m][v], size[v]) : sums[m][v] + acc[m][v] * size[v];
        }
      }
    }
    EACH_OF for (int v = 0; v < kVectors; v++) {
      const F unit = load_f16((const uint16_t*)head + v * F::N);
      EACH_OF for (int m = 0; m < MR; m++) {
        F sum = to_float(sums[m][v]) * unit;
        if constexpr (T::minima) {
          const I even = lows[v] & set_int(0x00ff00ff), odd = right<8>(lows[v]) & set_int(0x00ff00ff);
          const I low = dot_pair(dot_pair(set_int(0), even, starts[m]), odd, starts[MR + m]);
          sum = fma(to_float(low), load_f16((const uint16_t*)head + kPanel + v * F::N), sum);
        }
        float* to = c + m * kPanel + v * F::N;
        store(to, fma(sum, set(scales[m]), first && g == 0 ? set(0) : load(to)));
      }
    }
  }
}

// Tile for FP8: E4M3 is converted to pairs of bf16 by table lookup; a group is summed before its scale is applied.
template <class T, int MR>
void fp8_tile(const uint8_t* w, int64_t group, const typename T::X* x, int64_t groups, float* c, bool first, NextBlock ahead) {
  const int64_t steps = group / 2;
  for (int64_t g = 0; g < groups; g++, w += kPanel * (4 + group)) {
    F acc[MR][kVectors];
    EACH_OF for (int m = 0; m < MR; m++)
      EACH_OF for (int v = 0; v < kVectors; v++) acc[m][v] = set(0);
    for (int64_t s = 0; s < steps; s++, x += 2 * MR) {
      I row[kVectors];
      if constexpr (MR > 2) ahead.fetch(g * steps + s);
      else fetch_far(w + kPanel * (4 + 2 * s), 64);
      load_e4m3(w + kPanel * (4 + 2 * s), row);
      EACH_OF for (int m = 0; m < MR; m++)
        EACH_OF for (int v = 0; v < kVectors; v++) acc[m][v] = T::dot(acc[m][v], row[v], x + m * 2);
    }
    EACH_OF for (int v = 0; v < kVectors; v++) {
      const F scale = load((const float*)w + v * F::N);
      EACH_OF for (int m = 0; m < MR; m++) {
        float* to = c + m * kPanel + v * F::N;
        store(to, fma(acc[m][v], scale, first && g == 0 ? set(0) : load(to)));
      }
    }
  }
}

// acc[m][v] += x times the levels of the codes of one quad, for its value J of K.
template <int J, int MR>
[[gnu::always_inline]] inline void add_levels(const Book& book, const uint8_t* quad, const float* x, F (&acc)[MR][kVectors]) {
  constexpr int half = kVectors / 2;  // the low nibbles are of the first half of the rows
  EACH_OF for (int v = 0; v < half; v++) {
    const I codes = load_raw(quad + v * F::N * 4);
    const F low = look_up<2 * J>(book, codes), high = look_up<2 * J + 1>(book, codes);
    EACH_OF for (int m = 0; m < MR; m++) {
      acc[m][v] = fma(low, set(x[m]), acc[m][v]);
      acc[m][v + half] = fma(high, set(x[m]), acc[m][v + half]);
    }
  }
}

// Tile for NF4 and FP4: codes become floats by table lookup. Each group has four sums, one for the first value of each of its
// quads, one for the second and so on, which are scaled one after another. They are computed together where a tile has so few
// accumulators that one sum would be bound by the latency of additions, else in four passes over the group.
template <Fmt Format, int MR>
void book_tile(const uint8_t* w, int64_t group, const float* x, int64_t groups, float* c, bool first, NextBlock ahead) {
  constexpr bool together = F::N == 16 && MR <= 2;
  const Book book = load_book(Format == Fmt::NF4 ? kNormalFloats : kTwelfths);
  const int64_t quads = group / 4;
  for (int64_t g = 0; g < groups; g++, w += kPanel * (4 + group / 2), x += group * MR) {
    F scale[kVectors];
    EACH_OF for (int v = 0; v < kVectors; v++) scale[v] = load((const float*)w + v * F::N);
    const uint8_t* codes = w + kPanel * 4;
    auto scaled = [&](const F (&acc)[MR][kVectors], bool fresh) __attribute__((always_inline)) {
      EACH_OF for (int m = 0; m < MR; m++)
        EACH_OF for (int v = 0; v < kVectors; v++) {
          float* to = c + m * kPanel + v * F::N;
          store(to, fma(acc[m][v], scale[v], fresh ? set(0) : load(to)));
        }
    };
    if constexpr (together) {
      F acc[4][MR][kVectors];
      EACH_OF for (int j = 0; j < 4; j++)
        EACH_OF for (int m = 0; m < MR; m++)
          EACH_OF for (int v = 0; v < kVectors; v++) acc[j][m][v] = set(0);
      for (int64_t q = 0; q < quads; q++) {
        fetch_far(codes + q * 64, 64);
        const float* own = x + 4 * q * MR;
        add_levels<0, MR>(book, codes + q * 64, own, acc[0]);
        add_levels<1, MR>(book, codes + q * 64, own + MR, acc[1]);
        add_levels<2, MR>(book, codes + q * 64, own + 2 * MR, acc[2]);
        add_levels<3, MR>(book, codes + q * 64, own + 3 * MR, acc[3]);
      }
      EACH_OF for (int j = 0; j < 4; j++) scaled(acc[j], first && g == 0 && j == 0);
    } else {
      auto pass = [&]<int J>() __attribute__((always_inline)) {
        F acc[MR][kVectors];
        EACH_OF for (int m = 0; m < MR; m++)
          EACH_OF for (int v = 0; v < kVectors; v++) acc[m][v] = set(0);
        for (int64_t q = 0; q < quads; q++) {
          if constexpr (MR > 2) ahead.fetch((g * 4 + J) * quads + q);
          else if constexpr (J == 0) fetch_far(codes + q * 64, 64);
          add_levels<J, MR>(book, codes + q * 64, x + (4 * q + J) * MR, acc);
        }
        scaled(acc, first && g == 0 && J == 0);
      };
      pass.template operator()<0>(), pass.template operator()<1>(), pass.template operator()<2>(), pass.template operator()<3>();
    }
  }
}

// Calls f.operator()<rows>(), for rows in 1 .. MR.
template <int MR, class Fn>
void with_rows(int64_t rows, Fn f) {
  if constexpr (MR > 0) {
    if (rows == MR) return f.template operator()<MR>();
    with_rows<MR - 1>(rows, f);
  }
}

// The pass that processes `row`. Each block of kRows rows is divided into passes of about equal height, or for the matrix unit
// into passes of kMatrixPass rows and the rest.
struct Pass {
  int64_t first, height;
};
inline int64_t passes_over(int64_t rows, int most) { return (rows + most - 1) / most; }
inline Pass pass_of(const Weight& w, bool x_bf16, int64_t total, int64_t row) {
  const int64_t block = row / kRows * kRows, rows = std::min<int64_t>(kRows, total - block);
  if (uses_matrix_unit(w, x_bf16, total)) {
    const int64_t first = row / kMatrixPass * kMatrixPass;
    return {first, std::min(kMatrixPass, block + rows - first)};
  }
  const int64_t passes = passes_over(rows, tile_rows(w));
  const int64_t i = ((row - block + 1) * passes - 1) / rows, first = rows * i / passes;
  return {block + first, rows * (i + 1) / passes - first};
}

// Calls f<MR>(first row, ahead) for each pass over `rows` rows. Each pass prefetches a part of the next block, which follows
// `bytes` after this one: with several rows the hardware prefetcher does not reach far enough ahead.
template <int Most, class Fn>
void by_pass(int64_t rows, const uint8_t* block, int64_t bytes, int64_t steps, Fn f) {
  const int64_t passes = passes_over(rows, Most), share = bytes / passes;
  for (int64_t i = 0; i < passes; i++) {
    const int64_t row = rows * i / passes, next = rows * (i + 1) / passes;
    NextBlock ahead{block + bytes + i * share, rows <= 2 ? 0 : std::max<int64_t>(1, share / steps)};
    with_rows<Most>(next - row, [&]<int MR>() { f.template operator()<MR>(row, ahead); });
  }
}

constexpr int64_t kDepth = 1024;  // values of K in a block: 64 KiB of a bf16 panel, which stay in L2 during all passes

template <class T>
void float_panel(const LinearArgs& a, int64_t first_row, int64_t rows, const uint8_t* panel, float* tile) {
  for (int64_t k = 0; k < a.w->padded_k; k += kDepth) {
    const int64_t steps = std::min(kDepth, a.w->padded_k - k) / T::step;
    const uint8_t* w = panel + k / T::step * kPanel * T::bytes;
    by_pass<kFloatRows>(rows, w, steps * kPanel * T::bytes, steps, [&]<int MR>(int64_t m, NextBlock ahead) {
      auto x = (const typename T::X*)a.x.values + (first_row + m) * a.x.padded_k + k * MR;
      float_tile<T, MR>(w, x, steps, tile + m * kPanel, k == 0, ahead);
    });
  }
}

template <Fmt Format>
void code_panel(const LinearArgs& a, int64_t first_row, int64_t rows, const uint8_t* panel, float* tile) {
  const int64_t group = a.w->group, parts = a.w->parts(), depth = std::max<int64_t>(1, kDepth / (group * parts)) * parts;
  const int64_t block = a.w->block(), bytes = a.w->block_bytes(), spans = a.w->spans();
  for (int64_t g = 0; g < a.x.groups; g += depth) {
    const int64_t n = std::min(depth, a.x.groups - g);
    const uint8_t* w = panel + a.w->factor_bytes() + g / block * bytes;
    by_pass<kCodeRows>(rows, w, n / block * bytes, n * group / 4, [&]<int MR>(int64_t m, NextBlock ahead) {
      const int64_t row = first_row + m;
      auto x = (const int8_t*)a.x.values + row * a.x.padded_k + g * group * MR;
      constexpr auto run = groups_of_block(Format) > 1 ? block_tile<Format, MR> : code_tile<Format, MR>;
      run(*a.w, (const float*)panel, w, x, a.x.scales + row * spans + g / parts * MR, a.x.starts + row * a.x.groups + g * MR, n, tile + m * kPanel, g == 0, ahead);
    });
  }
}

template <class T>
void fp8_panel(const LinearArgs& a, int64_t first_row, int64_t rows, const uint8_t* panel, float* tile) {
  const int64_t group = a.w->group, depth = std::max<int64_t>(1, kDepth / group), bytes = a.w->block_bytes();
  const int64_t groups = a.w->padded_k / group;
  for (int64_t g = 0; g < groups; g += depth) {
    const int64_t n = std::min(depth, groups - g);
    by_pass<kFloatRows>(rows, panel + g * bytes, n * bytes, n * group / 2, [&]<int MR>(int64_t m, NextBlock ahead) {
      auto x = (const typename T::X*)a.x.values + (first_row + m) * a.x.padded_k + g * group * MR;
      fp8_tile<T, MR>(panel + g * bytes, group, x, n, tile + m * kPanel, g == 0, ahead);
    });
  }
}

template <Fmt Format>
void book_panel(const LinearArgs& a, int64_t first_row, int64_t rows, const uint8_t* panel, float* tile) {
  const int64_t group = a.w->group, depth = std::max<int64_t>(1, kDepth / group), bytes = a.w->block_bytes();
  const int64_t groups = a.w->padded_k / group;
  for (int64_t g = 0; g < groups; g += depth) {
    const int64_t n = std::min(depth, groups - g);
    by_pass<kFloatRows>(rows, panel + g * bytes, n * bytes, n * group, [&]<int MR>(int64_t m, NextBlock ahead) {
      auto x = (const float*)a.x.values + (first_row + m) * a.x.padded_k + g * group * MR;
      book_tile<Format, MR>(panel + g * bytes, group, x, n, tile + m * kPanel, g == 0, ahead);
    });
  }
}

void product_panel(const LinearArgs& a, int64_t first_row, int64_t rows, const uint8_t* panel, float* tile) {
  auto with = [&](auto run) { run(a, first_row, rows, panel, tile); };
  switch (a.w->fmt) {
    case Fmt::F32: return with(float_panel<F32Weights>);
    case Fmt::F16: return with(float_panel<F16Weights>);
    case Fmt::BF16: return with(a.x_bf16 ? float_panel<Bf16Pairs> : float_panel<Bf16Weights>);
    case Fmt::I8: return with(code_panel<Fmt::I8>);
    case Fmt::U8: return with(code_panel<Fmt::U8>);
    case Fmt::A8: return with(code_panel<Fmt::A8>);
    case Fmt::I4: return with(code_panel<Fmt::I4>);
    case Fmt::U4: return with(code_panel<Fmt::U4>);
    case Fmt::A4: return with(code_panel<Fmt::A4>);
    case Fmt::MX4: return with(code_panel<Fmt::MX4>);
    case Fmt::NV4: return with(code_panel<Fmt::NV4>);
    case Fmt::K4: return with(code_panel<Fmt::K4>);
    case Fmt::K5: return with(code_panel<Fmt::K5>);
    case Fmt::K6: return with(code_panel<Fmt::K6>);
    case Fmt::NF4: return with(book_panel<Fmt::NF4>);
    case Fmt::FP4: return with(book_panel<Fmt::FP4>);
    case Fmt::FP8: return with(a.x_bf16 ? fp8_panel<Bf16Pairs> : fp8_panel<Bf16Weights>);
  }
}

inline F activate(Act act, F x) {
  switch (act) {
    case Act::None: return x;
    case Act::Silu: return silu(x);
    case Act::Gelu: return gelu(x);
    case Act::GeluTanh: return gelu_tanh(x);
    case Act::Relu: return max(set(0), x);
    case Act::Relu2: x = max(set(0), x); return x * x;
    case Act::Sigmoid: return sigmoid(x);
    case Act::Tanh: return tanh(x);
    case Act::Exp: return exp(x);
    case Act::Softplus: return softplus(x);
  }
  return x;
}

// Loads the first n values, with zeros after them.
inline F load_first(const float* p, int64_t n) {
  if (n >= F::N) return load(p);
  float t[F::N] = {};
  std::memcpy(t, p, size_t(n) * 4);
  return load(t);
}
inline void store_first(float* p, F a, int64_t n) {
  if (n >= F::N) return store(p, a);
  float t[F::N];
  store(t, a);
  std::memcpy(p, t, size_t(n) * 4);
}

// Writes the existing columns of a unit: adds bias, applies scale and activation, multiplies by `up` with glu, adds residual.
void finish_row(const LinearArgs& a, int64_t row, int64_t unit, const float* y, const float* up) {
  const int64_t column = unit * kPanel, count = std::min<int64_t>(kPanel, a.w->half() - column);
  for (int64_t i = 0; i < count; i += F::N) {
    auto affine = [&](F v, const float* bias) {
      if (bias) v = v + load_first(bias + column + i, count - i);
      return v * set(a.scale);
    };
    F v = affine(load(y + i), a.bias);
    if (a.limit > 0) v = min(set(a.limit), v);
    v = a.alpha == 1 ? activate(a.act, v) : activate(a.act, v * set(a.alpha)) / set(a.alpha);
    if (a.w->glu) {
      F u = affine(load(up + i), a.bias ? a.bias + a.w->half() : nullptr);
      if (a.limit > 0) u = max(set(-a.limit), min(set(a.limit), u));
      v = v * (a.shift == 0 ? u : u + set(a.shift));
    }
    if (a.residual) v = v + load_first(a.residual + row * a.ld_residual + column + i, count - i);
    store_first(a.out + row * a.ld_out + column + i, v, count - i);
  }
}

void linear_units(const LinearArgs& a, int64_t first_row, int64_t rows, int64_t unit, int64_t count, float* tile) {
  const bool matrix = uses_matrix_unit(*a.w, a.x_bf16, a.x.m);
  const int64_t each = a.w->glu ? 2 : 1, together = matrix ? kPanels / each : 1, size = rows * kPanel;
  for (const int64_t end = unit + count; unit < end; unit += together) {
    const int64_t panels = std::min(together, end - unit) * each;
    const uint8_t* panel = a.w->data + unit * a.w->unit_bytes();
    if (matrix) matrix_panels(a, first_row, rows, panel, panels, tile);
    else for (int64_t p = 0; p < panels; p++) product_panel(a, first_row, rows, panel + p * a.w->panel_bytes, tile + p * size);
    for (int64_t m = 0; m < rows; m++)
      for (int64_t p = 0; p < panels; p += each) {
        const float* y = tile + p * size + m * kPanel;
        finish_row(a, first_row + m, unit + p / each, y, y + size);
      }
  }
}

// Quantises n activations to int8: scale max|x| / 127, codes rounded to nearest even. Returns the scale; NaN if a value is not
// finite, so that it shows in results and is not lost in a cast.
float quantise_span(const float* x, int64_t n, int8_t* codes) {
  F peaks = set(0), poison = set(0);
  for (int64_t i = 0; i < n; i += F::N) {
    F v = load(x + i);
    peaks = max(abs(v), peaks);
    poison = poison + v * set(0);
  }
  const float peak = largest(peaks), bad = sum(poison);
  const float inverse = peak >= kTiny && bad == 0 ? 127.0f / peak : 0.0f;
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, to nearest even
  if (bad == 0)
    for (int64_t i = 0; i < n; i++) codes[i] = int8_t(int32_t((x[i] * inverse + magic) - magic));
  else
    std::memset(codes, 0, size_t(n));
  return peak / 127.0f + bad;
}

inline int32_t offset_of(Fmt fmt) {
  switch (fmt) {
    case Fmt::I8: return Codes<Fmt::I8, 1>::offset;
    case Fmt::I4: return Codes<Fmt::I4, 1>::offset;
    case Fmt::MX4: return Codes<Fmt::MX4, 1>::offset;
    case Fmt::NV4: return Codes<Fmt::NV4, 1>::offset;
    case Fmt::K6: return Codes<Fmt::K6, 1>::offset;
    default: return 1;
  }
}

// Quantises a row of x span by span, and writes the start of each group's sum: -offset * (sum of its codes). For K4 and K5 these
// multiply the minima, as 16-bit words: those of a span's groups 0 and 2 share one 32-bit word, those of 1 and 3 the next.
void quantise_row(const Weight& w, const float* x, const Rows& to, const Pass& pass, int64_t lane) {
  const int64_t span = w.group * w.parts(), height = pass.height, step = matrix_step(w);
  const bool matrix = uses_matrix_unit(w, false, to.m);
  float padded[kMaxSpan];
  int8_t codes[kMaxSpan];
  for (int64_t begin = 0; begin < w.padded_k; begin += span) {
    const int64_t count = std::min(span, w.padded_k - begin), held = std::min(count, w.k - begin);
    const float* from = x + begin;
    if (held < count) {
      std::memset(padded, 0, sizeof padded);
      std::memcpy(padded, from, size_t(std::max<int64_t>(held, 0)) * 4);
      from = padded;
    }
    to.scales[pass.first * w.spans() + begin / span * height + lane] = quantise_span(from, count, codes);
    int32_t* starts = to.starts + pass.first * to.groups + begin / w.group * height + lane;
    for (int64_t g = 0; g < count / w.group; g++) {
      int32_t total = 0;
      for (int64_t i = 0; i < w.group; i++) total += codes[g * w.group + i];
      const int32_t start = -offset_of(w.fmt) * total;
      if (w.lines()) std::memcpy((uint8_t*)(starts + g % 2 * height) + g / 2 * 2, &start, 2);
      else starts[g * height] = start;
    }
    int8_t* out = (int8_t*)to.values + pass.first * w.padded_k + begin * height;
    if (matrix)
      for (int64_t i = 0; i < count; i += step) std::memcpy(out + i * height + lane * step, codes + i, size_t(step));
    else
      for (int64_t i = 0; i < count; i += 4) std::memcpy(out + i * height + lane * 4, codes + i, 4);
  }
}

void prepare_row(const Weight& w, bool x_bf16, const float* x, const Rows& to, int64_t row) {
  const Pass pass = pass_of(w, x_bf16, to.m, row);
  const int64_t base = pass.first * w.padded_k, lane = row - pass.first, height = pass.height;
  if (w.integer()) {
    quantise_row(w, x, to, pass, lane);
  } else if (x_bf16 && w.pairs()) {
    if (uses_matrix_unit(w, x_bf16, to.m)) return matrix_bf16_row(w, x, height, (uint16_t*)to.values + base, lane);
    uint16_t* out = (uint16_t*)to.values + base + lane * 2;
    uint16_t rounded[256];
    for (int64_t at = 0; at < w.padded_k; at += 256) {
      const int64_t count = std::min<int64_t>(256, w.padded_k - at), held = std::max<int64_t>(0, std::min(count, w.k - at));
      for (int64_t i = 0; i < held; i++) rounded[i] = to_bf16(x[at + i]);
      std::fill(rounded + held, rounded + count, uint16_t(0));
      for (int64_t i = 0; i < count; i += 2) std::memcpy(out + (at + i) * height, rounded + i, 4);
    }
  } else {
    const int64_t step = w.pairs() ? 2 : 1;
    float* out = (float*)to.values + base + lane * step;
    for (int64_t i = 0; i < w.padded_k; i++) {
      float v = i < w.k ? x[i] : 0.0f;
      out[i / step * step * height + i % step] = x_bf16 ? from_bf16(to_bf16(v)) : v;
    }
  }
}
