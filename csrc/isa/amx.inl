// Products by the matrix unit of Intel CPUs (AMX), for the instruction set `amx`; elsewhere uses_matrix_unit() is false. The unit
// has eight matrix registers of up to 16 rows of 64 bytes. An instruction adds to 16 x 16 results the products of 32 bf16
// values of K: the float sums of the even and of the odd ones, rounded after every addition, are added, then their sum to the
// result. So products of bf16 use the unit for any number of rows, as vector instructions would give other bits.

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)

constexpr int64_t kMatrixRows = 16;    // of a matrix register
constexpr int64_t kMatrixDepth = 512;  // values of K in a block: 32 KiB of a panel, which stay in L1 during all passes
constexpr int64_t kMatrixNear = 1 << 20;  // bytes of x that are expected to stay in L2 from one panel to the next

bool uses_matrix_unit(const Weight& w, bool x_bf16) { return w.fmt == Fmt::BF16 && x_bf16; }

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

// Data that is needed after this block: each step of a pass prefetches the next `bytes` of it into L2.
struct Ahead {
  const uint8_t* at;
  int64_t bytes;
  [[gnu::always_inline]] void fetch(int64_t step) const {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(at + step * bytes + b, 0, 2);
  }
};

// c[row][0 .. 31] += x times a panel over `steps` steps of `words` pairs of K. x: [step][row][pairs].
template <bool Lower>  // there are more than 16 rows
void matrix_pass(const uint8_t* w, const uint8_t* x, int64_t rows, int64_t words, int64_t steps, float* c, bool first, Ahead weights, Ahead rows_of_x) {
  constexpr int64_t stride = kPanel * 4;
  float* lower = c + kMatrixRows * kPanel;
  if (first) {
    clear_matrix<0>(), clear_matrix<1>();
    if constexpr (Lower) clear_matrix<2>(), clear_matrix<3>();
  } else {
    load_matrix<0>(c, stride), load_matrix<1>(c + 16, stride);
    if constexpr (Lower) load_matrix<2>(lower, stride), load_matrix<3>(lower + 16, stride);
  }
  for (int64_t s = 0; s < steps; s++, w += words * stride, x += rows * words * 4) {
    if (rows <= 2) fetch_far(w, kMatrixRows * stride);
    else weights.fetch(s), rows_of_x.fetch(s);
    load_matrix<4>(x, words * 4), load_matrix<6>(w, stride);
    add_bf16_products<0, 4, 6>();
    load_matrix<7>(w + 64, stride);
    add_bf16_products<1, 4, 7>();
    if constexpr (Lower) {
      load_matrix<5>(x + kMatrixRows * words * 4, words * 4);
      add_bf16_products<2, 5, 6>(), add_bf16_products<3, 5, 7>();
    }
  }
  store_matrix<0>(c, stride), store_matrix<1>(c + 16, stride);
  if constexpr (Lower) store_matrix<2>(lower, stride), store_matrix<3>(lower + 16, stride);
}

// Blocks of K are the outer loop, so that the rows of x of a block, 512 KiB at most, are in L2 for all panels. A single pass
// reads the panels in their order, which is that of memory.
void matrix_panels(const LinearArgs& a, int64_t first_row, int64_t rows, const uint8_t* panel, int64_t panels, float* tile) {
  MatrixRegisters registers;
  const int64_t all = a.w->padded_k, passes = passes_over(rows, kMatrixPass), most = passes == 1 ? all : kMatrixDepth;
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
        const Ahead weights{next + m / kMatrixPass * share * steps, share};
        const Ahead rows_of_x{x + next_k * height * 2 + p * own * steps, rows * all * 2 > kMatrixNear ? own : 0};
        registers.shape(height, words);
        (height > kMatrixRows ? matrix_pass<true> : matrix_pass<false>)(w, x + k * height * 2, height, words, steps, tile + (p * rows + m) * kPanel, k == 0, weights, rows_of_x);
      }
    }
  }
}

#else

bool uses_matrix_unit(const Weight&, bool) { return false; }
void matrix_panels(const LinearArgs&, int64_t, int64_t, const uint8_t*, int64_t, float*) {}

#endif
