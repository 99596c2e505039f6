// Matrix products by the matrix unit of Intel CPUs (AMX), for the instruction set `amx`; for others uses_matrix_unit() is false.
// The unit has eight matrix registers of up to 16 rows of 64 bytes. For each of 16 x 16 results, an instruction adds the products
// of 32 bf16 values of K: it sums those at even and those at odd K separately, in float, rounded after every addition; adds the
// two sums; and adds this to the result. Vector instructions add in another order and give other bits, so products of bf16 use
// the unit for any number of rows.

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)

constexpr int64_t kMatrixRows = 16;    // of a matrix register
constexpr int64_t kMatrixDepth = 288;  // values of K in a block, at most: 18 KiB of a panel, which stay in L1 during all passes
constexpr int64_t kCodeDepth = 512;    // and of codes: 16 KiB
constexpr int64_t kMatrixNear = 1 << 20;  // bytes of x that are expected to stay in L2 from one panel to the next

constexpr int64_t kMatrixStep = 32;  // bf16 values of K that an instruction multiplies
constexpr int64_t kLeastWide = 8, kLeastNarrow = 32;  // rows of x from which on the unit is faster for codes of 8 and of 4 bits

// Sums of integers are exact, so for these the unit is used where it is faster. The other formats have groups of 16 values, or
// scales of groups that are integers.
bool uses_matrix_unit(const Weight& w, bool x_bf16, int64_t rows) {
  const bool integer = w.wide() || w.fmt == Fmt::I4 || w.fmt == Fmt::U4 || w.fmt == Fmt::A4 || w.fmt == Fmt::MX4;
  return w.fmt == Fmt::BF16 ? x_bf16 : integer && rows >= (w.wide() ? kLeastWide : kLeastNarrow);
}
int64_t matrix_step(const Weight& w) { return !w.integer() ? kMatrixStep : w.group % 64 ? 32 : 64; }

// Bytes are read and written behind the compiler's back, hence "memory".
template <int R>
void load_matrix(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(R) : "memory");
}
template <int R>
void store_matrix(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(R) : "memory");
}
template <int R>
void clear_matrix() {
  asm volatile("tilezero %%tmm%c0" ::"i"(R));
}
// Register C += register A times register B. A: [row][pairs of K], B: [pairs of K][column].
template <int C, int A, int B>
void add_bf16_products() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// The same with signed bytes in A and unsigned bytes in B, four of K to a word.
template <int C, int A, int B>
void add_byte_products() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Configures this thread's matrix registers while it lives. Registers 0 and 1 hold results of the first 16 rows of x with the
// columns 0-15 and 16-31 of a panel, 2 and 3 those of the next 16 rows; 4 and 5 hold x, 6 and 7 the weights.
class MatrixRegisters {
 public:
  MatrixRegisters() = default;
  MatrixRegisters(const MatrixRegisters&) = delete;
  ~MatrixRegisters() {
    if (rows_) asm volatile("tilerelease");
  }
  // For `rows` rows of x, at most 32, and instructions that multiply `words` words of 4 bytes along K. Clears all registers.
  void shape(int64_t rows, int64_t words) {
    if (rows == rows_ && words == words_) return;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    auto set = [&](int at, int64_t count, int64_t bytes) { config.rows[at] = uint8_t(count), config.row_bytes[at] = uint16_t(bytes); };
    const int64_t upper = std::min(rows, kMatrixRows), lower = rows - upper;
    set(0, upper, 64), set(1, upper, 64), set(4, upper, words * 4);
    if (lower) set(2, lower, 64), set(3, lower, 64), set(5, lower, words * 4);
    set(6, words, 64), set(7, words, 64);
    asm volatile("ldtilecfg %0" ::"m"(config));
    rows_ = rows, words_ = words;
  }

 private:
  int64_t rows_ = 0, words_ = 0;
};

inline __mmask32 first_lanes(int64_t n) { return n >= 32 ? ~__mmask32(0) : n > 0 ? (__mmask32(1) << n) - 1 : 0; }

void matrix_bf16_row(const Weight& w, const float* x, int64_t height, uint16_t* pass, int64_t lane) {
  for (int64_t k = 0; k < w.padded_k; k += kMatrixStep) {
    const int64_t width = std::min(kMatrixStep, w.padded_k - k);
    const __mmask32 held = first_lanes(w.k - k);
    const __m512 low = _mm512_maskz_loadu_ps(__mmask16(held), x + k), high = _mm512_maskz_loadu_ps(__mmask16(held >> 16), x + k + 16);
    _mm512_mask_storeu_epi16(pass + k * height + lane * width, first_lanes(width), (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

// Data that is needed after this block: each step of a pass prefetches the next `bytes` of it into L2.
struct Ahead {
  const uint8_t* at = nullptr;
  int64_t bytes = 0;
  [[gnu::always_inline]] void fetch(int64_t step) const {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(at + step * bytes + b, 0, 2);
  }
};

// Where rows of x are: bytes from a row to the next, and from a step to the next. A second part of a row's step follows the first.
struct RowsAt {
  const uint8_t* x;
  int64_t row, step;
};

// c[row][0 .. 31] += x times a panel over `steps` steps of `words` pairs of K; `ld` floats from a row of c to the next. With two
// Parts, x is the sum of two bf16 values, which are multiplied one after the other.
template <bool Lower, int Parts = 1>  // Lower: there are more than 16 rows
void matrix_pass(const uint8_t* w, const RowsAt& at, int64_t words, int64_t steps, float* c, int64_t ld, bool first, Ahead weights, Ahead rows_of_x) {
  const int64_t stride = ld * 4;
  float* lower = c + kMatrixRows * ld;
  if (first) {
    clear_matrix<0>(), clear_matrix<1>();
    if constexpr (Lower) clear_matrix<2>(), clear_matrix<3>();
  } else {
    load_matrix<0>(c, stride), load_matrix<1>(c + 16, stride);
    if constexpr (Lower) load_matrix<2>(lower, stride), load_matrix<3>(lower + 16, stride);
  }
  const uint8_t* x = at.x;
  for (int64_t s = 0; s < steps; s++, w += words * kPanel * 4, x += at.step) {
    weights.fetch(s), rows_of_x.fetch(s);
    load_matrix<6>(w, kPanel * 4), load_matrix<7>(w + 64, kPanel * 4);
    EACH_OF for (int part = 0; part < Parts; part++) {
      const uint8_t* own = x + part * words * 4;
      load_matrix<4>(own, at.row);
      add_bf16_products<0, 4, 6>(), add_bf16_products<1, 4, 7>();
      if constexpr (Lower) {
        load_matrix<5>(own + kMatrixRows * at.row, at.row);
        add_bf16_products<2, 5, 6>(), add_bf16_products<3, 5, 7>();
      }
    }
  }
  store_matrix<0>(c, stride), store_matrix<1>(c + 16, stride);
  if constexpr (Lower) store_matrix<2>(lower, stride), store_matrix<3>(lower + 16, stride);
}

// As code_tile(), with the same bits. A group's codes are at `codes`, [group/4][32][4] bytes, `group_bytes` from one group to the
// next, its head at `head`.
template <Fmt Format, bool Lower>
void matrix_code_pass(const Weight& w, const uint8_t* head, const uint8_t* codes, int64_t group_bytes, const int8_t* x, const float* scales, const int32_t* starts, int64_t rows, int64_t groups, float* c, bool first, Ahead weights, Ahead rows_of_x) {
  using T = Codes<Format, kCodeRows>;
  alignas(64) int32_t sums[kMatrixPass * kPanel];
  alignas(64) float span[kMatrixPass * kPanel];
  constexpr int64_t stride = kPanel * 4;
  const int64_t step = matrix_step(w), parts = w.parts(), scale_bytes = w.scale_bytes();
  int64_t fetched = 0;
  for (int64_t g = 0; g < groups; g++, head += w.block_bytes(), codes += group_bytes) {
    clear_matrix<0>(), clear_matrix<1>();
    if constexpr (Lower) clear_matrix<2>(), clear_matrix<3>();
    for (int64_t k = 0; k < w.group; k += step, x += rows * step, fetched++) {
      weights.fetch(fetched), rows_of_x.fetch(fetched);
      load_matrix<4>(x, step), load_matrix<6>(codes + k * kPanel, stride);
      add_byte_products<0, 4, 6>();
      load_matrix<7>(codes + k * kPanel + 64, stride);
      add_byte_products<1, 4, 7>();
      if constexpr (Lower) {
        load_matrix<5>(x + kMatrixRows * step, step);
        add_byte_products<2, 5, 6>(), add_byte_products<3, 5, 7>();
      }
    }
    store_matrix<0>(sums, stride), store_matrix<1>(sums + 16, stride);
    if constexpr (Lower) store_matrix<2>(sums + kMatrixRows * kPanel, stride), store_matrix<3>(sums + kMatrixRows * kPanel + 16, stride);
    const bool opens = g % parts == 0, closes = g % parts == parts - 1 || g == groups - 1, fresh = first && g < parts;
    F ws[kVectors], lows[kVectors];
    T::scales(head, w.scale, nullptr, ws);
    if constexpr (T::affine) T::scales(head + kPanel * scale_bytes, w.scale, nullptr, lows);
    const int32_t* start = starts + g * rows;
    const float* scale = scales + g / parts * rows;
    auto add = [&](bool opens, bool closes) __attribute__((always_inline)) {
      for (int64_t m = 0; m < rows; m++)
        EACH_OF for (int v = 0; v < kVectors; v++) {
          const int64_t at = m * kPanel + v * F::N;
          F sum = fma(to_float(load_raw(sums + at) + T::begin(head, scale_bytes, v, start[m])), ws[v], opens ? set(0) : load(span + at));
          if constexpr (T::affine) sum = fma(set(float(start[m])), lows[v], sum);
          if (closes) store(c + at, fma(sum, set(scale[m]), fresh ? set(0) : load(c + at)));
          else store(span + at, sum);
        }
    };
    if (opens && closes) add(true, true);
    else if (opens) add(true, false);
    else if (closes) add(false, true);
    else add(false, false);
  }
}

// Codes of `groups` groups as bytes, [group/4][32][4] a group.
template <Fmt Format>
void unpack_groups(const Weight& w, const uint8_t* from, int64_t groups, uint8_t* to) {
  using T = Codes<Format, kCodeRows>;
  for (int64_t g = 0; g < groups; g++, from += w.block_bytes()) {
    const uint8_t* codes = from + w.head_bytes();
    for (int64_t q = 0; q < w.group / 4; q++, codes += T::bytes, to += kPanel * 4) {
      I own[1][2];
      T::load_w(codes, 0, own);
      _mm512_store_si512(to, own[0][0].v), _mm512_store_si512(to + 64, own[0][1].v);
    }
  }
}

template <Fmt Format>
void matrix_code_panels(const LinearArgs& a, int64_t first_row, int64_t rows, const uint8_t* panel, int64_t panels, float* tile) {
  using T = Codes<Format, kCodeRows>;
  alignas(64) uint8_t unpacked[kMaxSpan * kPanel];
  MatrixRegisters registers;
  const Weight& w = *a.w;
  const int64_t parts = w.parts(), groups = a.x.groups, most = std::max<int64_t>(1, kCodeDepth / (w.group * parts)) * parts, step = matrix_step(w);
  const bool packed = !T::wide || w.head_bytes() % 64;  // codes that the unit cannot read, or only slowly as they cross cache lines
  for (int64_t g = 0; g < groups; g += most) {
    const int64_t n = std::min(most, groups - g), steps = n * w.group / step, passes = passes_over(rows, kMatrixPass);
    const int64_t share = n * w.block_bytes() / passes / steps / 64 * 64 + 64, next_k = g + n < groups ? (g + n) * w.group : 0;
    for (int64_t p = 0; p < panels; p++) {
      const uint8_t* head = panel + p * w.panel_bytes + g * w.block_bytes();
      const uint8_t* next = p + 1 < panels ? head + w.panel_bytes : panel + (next_k ? (g + n) * w.block_bytes() : panels * w.panel_bytes);
      if (packed) unpack_groups<Format>(w, head, n, unpacked);
      for (int64_t m = 0; m < rows; m += kMatrixPass) {
        const int64_t height = std::min(kMatrixPass, rows - m), row = first_row + m;
        auto x = (const int8_t*)a.x.values + row * w.padded_k;
        const int64_t own = (height * step / panels + 63) / 64 * 64;
        const Ahead weights{next + m / kMatrixPass * share * steps, share};
        const Ahead rows_of_x{(const uint8_t*)x + next_k * height + p * own * steps, rows * w.padded_k > kMatrixNear ? own : 0};
        registers.shape(height, step / 4);
        (height > kMatrixRows ? matrix_code_pass<Format, true> : matrix_code_pass<Format, false>)(
            w, head, packed ? unpacked : head + w.head_bytes(), packed ? w.group * kPanel : w.block_bytes(), x + g * w.group * height,
            a.x.scales + row * w.spans() + g / parts * height, a.x.starts + row * groups + g * height, height, n, tile + (p * rows + m) * kPanel, g == 0, weights, rows_of_x);
      }
    }
  }
}

// Blocks of K are the outer loop, so that the rows of x of a block, 288 KiB at most, are in L2 for all panels. A single pass
// reads the panels in their order, which is that of memory.
void matrix_bf16_panels(const LinearArgs& a, int64_t first_row, int64_t rows, const uint8_t* panel, int64_t panels, float* tile) {
  MatrixRegisters registers;
  const int64_t all = a.w->padded_k, passes = passes_over(rows, kMatrixPass), blocks = passes == 1 ? 1 : passes_over(all, kMatrixDepth);
  const int64_t most = passes_over(all, int(blocks * kMatrixStep)) * kMatrixStep;  // all blocks but the last have this depth
  for (int64_t k = 0, depth; k < all; k += depth) {
    depth = std::min(most, all - k) / kMatrixStep * kMatrixStep;
    if (!depth) depth = all - k;  // the last step may have fewer values
    const int64_t words = std::min(kMatrixStep, depth) / 2, steps = depth / (2 * words);
    const int64_t share = depth * kPanel * 2 / passes / steps / 64 * 64 + 64, next_k = k + depth < all ? k + depth : 0;
    for (int64_t p = 0; p < panels; p++) {
      const uint8_t* w = panel + p * a.w->panel_bytes + k * kPanel * 2;
      const uint8_t* next = p + 1 < panels ? w + a.w->panel_bytes : panel + (next_k ? next_k * kPanel * 2 : panels * a.w->panel_bytes);
      for (int64_t m = 0; m < rows; m += kMatrixPass) {
        const int64_t height = std::min(kMatrixPass, rows - m);
        auto x = (const uint8_t*)a.x.values + (first_row + m) * all * 2;
        const int64_t own = (height * words * 4 / panels + 63) / 64 * 64;
        const Ahead weights = passes == 1 ? Ahead{w + kReach, words * kPanel * 4} : Ahead{next + m / kMatrixPass * share * steps, share};
        const Ahead rows_of_x{x + next_k * height * 2 + p * own * steps, rows * all * 2 > kMatrixNear ? own : 0};
        registers.shape(height, words);
        (height > kMatrixRows ? matrix_pass<true> : matrix_pass<false>)(w, {x + k * height * 2, words * 4, height * words * 4}, words, steps, tile + (p * rows + m) * kPanel, kPanel, k == 0, weights, rows_of_x);
      }
    }
  }
}

void matrix_panels(const LinearArgs& a, int64_t first_row, int64_t rows, const uint8_t* panel, int64_t panels, float* tile) {
  auto with = [&](auto run) { run(a, first_row, rows, panel, panels, tile); };
  switch (a.w->fmt) {
    case Fmt::I8: return with(matrix_code_panels<Fmt::I8>);
    case Fmt::U8: return with(matrix_code_panels<Fmt::U8>);
    case Fmt::A8: return with(matrix_code_panels<Fmt::A8>);
    case Fmt::I4: return with(matrix_code_panels<Fmt::I4>);
    case Fmt::U4: return with(matrix_code_panels<Fmt::U4>);
    case Fmt::A4: return with(matrix_code_panels<Fmt::A4>);
    case Fmt::MX4: return with(matrix_code_panels<Fmt::MX4>);
    default: return with(matrix_bf16_panels);
  }
}

#else

bool uses_matrix_unit(const Weight&, bool, int64_t) { return false; }
int64_t matrix_step(const Weight&) { return 0; }
void matrix_bf16_row(const Weight&, const float*, int64_t, uint16_t*, int64_t) {}
void matrix_panels(const LinearArgs&, int64_t, int64_t, const uint8_t*, int64_t, float*) {}

#endif
