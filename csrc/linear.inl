// The matrix product. Every element of the result is one chain over K in ascending order (by single values, bf16 pairs
// or exact integer groups), so no tiling, batch or thread count can change its bits.

// Accumulators live in registers only if every loop over them is unrolled: at -O3 alone GCC keeps them in memory.
#define EACH_OF _Pragma("GCC unroll 32")

// How one weight format is read: `Step` values of K at a time, `bytes` per column and step.
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

constexpr int kVectors = kPanel / F::N;  // vectors of a panel's row
constexpr int kTileRows = F::N == 16 ? 6 : 3;

template <class T, int MR, int NP>
void float_tile(const uint8_t* w, int64_t panel_bytes, const typename T::X* x, int64_t stride, int64_t steps, float* c, bool first) {
  F acc[MR][NP * kVectors];
  EACH_OF for (int m = 0; m < MR; m++)
    EACH_OF for (int v = 0; v < NP * kVectors; v++) acc[m][v] = first ? set(0) : load(c + m * kUnit + v * F::N);
  for (int64_t s = 0; s < steps; s++) {
    typename T::W row[NP * kVectors];
    EACH_OF for (int p = 0; p < NP; p++)
      EACH_OF for (int v = 0; v < kVectors; v++)
        row[p * kVectors + v] = T::load_w(w + p * panel_bytes + (s * kPanel + v * F::N) * T::bytes);
    EACH_OF for (int m = 0; m < MR; m++)
      EACH_OF for (int v = 0; v < NP * kVectors; v++) acc[m][v] = T::dot(acc[m][v], row[v], x + m * stride + s * T::step);
  }
  EACH_OF for (int m = 0; m < MR; m++)
    EACH_OF for (int v = 0; v < NP * kVectors; v++) store(c + m * kUnit + v * F::N, acc[m][v]);
}

template <int Bits>
struct Codes {
  static constexpr int quad_bytes = Bits == 8 ? 128 : 64;  // a panel's codes for four values of K
  static constexpr int offset = Bits == 8 ? kOffset8 : 8;
  static void load_w(const uint8_t* p, I* w) {
    if constexpr (Bits == 8) {
      EACH_OF for (int v = 0; v < kVectors; v++) w[v] = load_raw(p + v * F::N * 4);
    } else {
      EACH_OF for (int v = 0; v < kVectors / 2; v++) {
        I both = load_raw(p + v * F::N * 4);
        w[v] = low_nibbles(both);
        w[v + kVectors / 2] = high_nibbles(both);
      }
    }
  }
  static I dot(I acc, I w, int32_t quad) {
    if constexpr (Bits == 8) return dot_u8(acc, w, quad);
    return dot_u4(acc, w, quad);
  }
};

template <int Bits, int MR, int NP>
void code_tile(const Weight& w, const uint8_t* panel, const Rows& x, int64_t row, int64_t g0, int64_t g1, float* c, bool first) {
  using T = Codes<Bits>;
  const int64_t quads = w.group / 4, group_bytes = 64 + quads * T::quad_bytes;
  if (first)
    EACH_OF for (int m = 0; m < MR; m++)
      EACH_OF for (int v = 0; v < NP * kVectors; v++) store(c + m * kUnit + v * F::N, set(0));
  for (int64_t g = g0; g < g1; g++) {
    const uint8_t* at = panel + g * group_bytes;
    const int8_t* codes = (const int8_t*)x.values + row * x.stride + g * w.group;
    I acc[MR][NP * kVectors];
    EACH_OF for (int m = 0; m < MR; m++)
      EACH_OF for (int v = 0; v < NP * kVectors; v++) acc[m][v] = set_int(-T::offset * x.sums[(row + m) * x.groups + g]);
    for (int64_t q = 0; q < quads; q++) {
      I cols[NP * kVectors];
      EACH_OF for (int p = 0; p < NP; p++) T::load_w(at + p * w.panel_bytes + 64 + q * T::quad_bytes, cols + p * kVectors);
      EACH_OF for (int m = 0; m < MR; m++) {
        int32_t quad;
        std::memcpy(&quad, codes + m * x.stride + q * 4, 4);
        EACH_OF for (int v = 0; v < NP * kVectors; v++) acc[m][v] = T::dot(acc[m][v], cols[v], quad);
      }
    }
    EACH_OF for (int p = 0; p < NP; p++)
      EACH_OF for (int v = 0; v < kVectors; v++) {
        F ws = load_bf16((const uint16_t*)(at + p * w.panel_bytes) + v * F::N);
        EACH_OF for (int m = 0; m < MR; m++) {
          float* to = c + m * kUnit + p * kPanel + v * F::N;
          F scale = ws * set(x.scales[(row + m) * x.groups + g]);
          store(to, fma(to_float(acc[m][p * kVectors + v]), scale, load(to)));
        }
      }
  }
}

// Runs f<MR>() for MR rows, 1..kTileRows.
template <class Fn>
void with_rows(int64_t rows, Fn f) {
  switch (rows) {
    case 1: return f.template operator()<1>();
    case 2: return f.template operator()<2>();
    case 3: return f.template operator()<3>();
    case 4: if constexpr (kTileRows > 3) return f.template operator()<4>(); break;
    case 5: if constexpr (kTileRows > 3) return f.template operator()<5>(); break;
    case 6: if constexpr (kTileRows > 3) return f.template operator()<6>(); break;
  }
}

constexpr int64_t kDepth = 2048;  // values of K per pass: two bf16 panels of it are 256 KiB, which a core's L2 holds

template <class T, int NP>
void float_unit(const LinearArgs& a, int64_t first_row, int64_t rows, const uint8_t* panel, float* tile) {
  for (int64_t k = 0; k < a.w->padded_k; k += kDepth) {
    int64_t steps = (std::min(kDepth, a.w->padded_k - k)) / T::step;
    const uint8_t* w = panel + k / T::step * kPanel * T::bytes;
    for (int64_t m = 0; m < rows; m += kTileRows) {
      auto x = (const typename T::X*)a.x.values + (first_row + m) * a.x.stride + k;
      with_rows(std::min<int64_t>(kTileRows, rows - m), [&]<int MR>() {
        float_tile<T, MR, NP>(w, a.w->panel_bytes, x, a.x.stride, steps, tile + m * kUnit, k == 0);
      });
    }
  }
}

template <int Bits, int NP>
void code_unit(const LinearArgs& a, int64_t first_row, int64_t rows, const uint8_t* panel, float* tile) {
  int64_t depth = std::max<int64_t>(1, 2 * kDepth / a.w->group);
  for (int64_t g = 0; g < a.x.groups; g += depth)
    for (int64_t m = 0; m < rows; m += kTileRows)
      with_rows(std::min<int64_t>(kTileRows, rows - m), [&]<int MR>() {
        code_tile<Bits, MR, NP>(*a.w, panel, a.x, first_row + m, g, std::min(a.x.groups, g + depth), tile + m * kUnit, g == 0);
      });
}

template <int NP>
void product_unit(const LinearArgs& a, int64_t first_row, int64_t rows, const uint8_t* panel, float* tile) {
  switch (a.w->fmt) {
    case Fmt::F32: return float_unit<F32Weights, NP>(a, first_row, rows, panel, tile);
    case Fmt::F16: return float_unit<F16Weights, NP>(a, first_row, rows, panel, tile);
    case Fmt::BF16:
      return a.x_bf16 ? float_unit<Bf16Pairs, NP>(a, first_row, rows, panel, tile)
                      : float_unit<Bf16Weights, NP>(a, first_row, rows, panel, tile);
    case Fmt::I8: return code_unit<8, NP>(a, first_row, rows, panel, tile);
    case Fmt::I4: return code_unit<4, NP>(a, first_row, rows, panel, tile);
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
  }
  return x;
}

// bias, scale, activation or gated pair, residual; then the columns that exist go out.
void finish_row(const LinearArgs& a, int64_t row, int64_t unit, const float* y) {
  const int64_t columns = a.w->glu ? kPanel : kUnit, column = unit * columns;
  const int64_t count = std::min(columns, a.w->half() - column);
  float b[kUnit] = {}, r[kUnit] = {}, out[kUnit];
  if (a.bias) {
    std::memcpy(b, a.bias + column, count * 4);
    if (a.w->glu) std::memcpy(b + kPanel, a.bias + a.w->half() + column, count * 4);
  }
  if (a.residual) std::memcpy(r, a.residual + row * a.ld_residual + column, count * 4);
  for (int64_t i = 0; i < columns; i += F::N) {
    F v = (load(y + i) + load(b + i)) * set(a.scale);
    v = activate(a.act, v);
    if (a.w->glu) v = v * ((load(y + kPanel + i) + load(b + kPanel + i)) * set(a.scale));
    store(out + i, a.residual ? v + load(r + i) : v);
  }
  std::memcpy(a.out + row * a.ld_out + column, out, count * 4);
}

void linear_unit(const LinearArgs& a, int64_t first_row, int64_t rows, int64_t unit, float* tile) {
  const uint8_t* panel = a.w->data + unit * 2 * a.w->panel_bytes;
  if (unit * 2 + 1 < a.w->panels)
    product_unit<2>(a, first_row, rows, panel, tile);
  else
    product_unit<1>(a, first_row, rows, panel, tile);
  for (int64_t m = 0; m < rows; m++) finish_row(a, first_row + m, unit, tile + m * kUnit);
}

// One group of activations to int8: scale max|x| / 127, codes to nearest even. A NaN or infinity makes the scale NaN, so
// that it reaches the result instead of vanishing in a cast.
void quantise_group(const float* x, int64_t n, int8_t* codes, float* scale, int32_t* total) {
  F peaks = set(0), poison = set(0);
  for (int64_t i = 0; i < n; i += F::N) {
    F v = load(x + i);
    peaks = max(abs(v), peaks);
    poison = poison + v * set(0);
  }
  float peak = largest(peaks), bad = sum(poison);
  float inverse = peak >= kTiny && bad == 0 ? 127.0f / peak : 0.0f;
  *scale = peak / 127.0f + bad;
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, to nearest even
  int32_t sum_of_codes = 0;
  if (bad == 0)
    for (int64_t i = 0; i < n; i++) {
      int32_t code = int32_t((x[i] * inverse + magic) - magic);
      codes[i] = int8_t(code);
      sum_of_codes += code;
    }
  else
    std::memset(codes, 0, size_t(n));
  *total = sum_of_codes;
}

void prepare_row(const Weight& w, bool x_bf16, const float* x, const Rows& to, int64_t row) {
  if (w.fmt == Fmt::I8 || w.fmt == Fmt::I4) {
    for (int64_t g = 0; g < to.groups; g++) {
      int64_t begin = g * w.group, at = row * to.groups + g;
      const float* from = x + begin;
      float padded[1024];
      if (begin + w.group > w.k) {
        std::memset(padded, 0, sizeof padded);
        std::memcpy(padded, from, size_t(w.k - begin) * 4);
        from = padded;
      }
      quantise_group(from, w.group, (int8_t*)to.values + row * to.stride + begin, to.scales + at, to.sums + at);
    }
  } else if (x_bf16 && w.fmt == Fmt::BF16) {
    uint16_t* out = (uint16_t*)to.values + row * to.stride;
    for (int64_t i = 0; i < w.k; i++) out[i] = to_bf16(x[i]);
    for (int64_t i = w.k; i < w.padded_k; i++) out[i] = 0;
  } else {
    float* out = (float*)to.values + row * to.stride;
    for (int64_t i = 0; i < w.k; i++) out[i] = x_bf16 ? from_bf16(to_bf16(x[i])) : x[i];
    for (int64_t i = w.k; i < w.padded_k; i++) out[i] = 0;
  }
}
