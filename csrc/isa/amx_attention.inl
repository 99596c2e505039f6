// Attention to a BF16 cache by the matrix unit of Intel CPUs (AMX): scores and weighted values of a split. Queries and weights, which
// are floats, are divided into two bf16 values each, which hold 16 to 17 bits of them; so a sum's error is about that of 64 more
// additions in float. Keys and values are paired for the unit's second operand: two values of a key, two positions of a column.

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)

bool attends_by_matrix_unit(const AttendArgs& a) { return a.format == Fmt::BF16 && !a.latent && !a.rope && !a.chosen; }

constexpr int64_t kPartBytes = 64;  // of a step of 32 values, as a part: bf16

// 32 floats as two bf16 values each, whose sum is the float up to 2^-17 of it: 64 bytes of the larger ones, then of the smaller.
inline void divide_step(const __m512 (&x)[2], void* to) {
  for (int i = 0; i < 2; i++) {
    const __m256i large = (__m256i)_mm512_cvtneps_pbh(x[i]);
    const __m512 held = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(large), 16));
    _mm256_store_si256((__m256i*)to + i, large);
    _mm256_store_si256((__m256i*)to + 2 + i, (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(x[i], held)));
  }
}

// Sixteen columns of two rows of bf16 as pairs; a null row is zeros.
inline void pair_rows(const uint16_t* even, const uint16_t* odd, void* to) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)even));
  const __m512i high = odd ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)odd)) : _mm512_setzero_si512();
  _mm512_store_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

// scores[r * kSplit + i] = query r times the key at i, for positions begin <= i < end of the split; and some values in the rest of
// the steps of 32 positions. `base`: position of the first page, both counted from the split's start.
void matrix_scores(const AttendArgs& a, const float* const* query, int rows, const char* const* pages, int64_t base, int begin, int end, float* scores) {
  constexpr int64_t most = kMaxHead / kMatrixStep;
  alignas(64) uint8_t q[kMatrixPass * most * 2 * kPartBytes], keys[most * kMatrixRows * kPanel * 4];
  const int64_t steps = (a.head_dim + kMatrixStep - 1) / kMatrixStep, row_bytes = steps * 2 * kPartBytes;
  const int64_t page_bytes = a.block_bytes(a.head_dim), pairs = steps * kMatrixRows;
  MatrixRegisters registers;
  for (int64_t first = 0; first < rows; first += kMatrixPass) {
    const int64_t height = std::min<int64_t>(kMatrixPass, rows - first);
    for (int64_t r = 0; r < height; r++)
      for (int64_t s = 0; s < steps; s++) {
        const float* from = query[first + r] + s * kMatrixStep;
        const int64_t left = a.head_dim - s * kMatrixStep;
        const __m512 x[2] = {_mm512_maskz_loadu_ps(__mmask16(first_lanes(left)), from), _mm512_maskz_loadu_ps(__mmask16(first_lanes(left) >> 16), from + 16)};
        divide_step(x, q + r * row_bytes + s * 2 * kPartBytes);
      }
    registers.shape(height, kMatrixRows);
    for (int i = begin / 32 * 32; i < end; i += 32) {
      for (int half = 0; half < 32; half += 16) {
        if (i + half < begin || i + half >= end) continue;
        const int64_t page = (i + half - base) / a.page, at = (i + half - base) % a.page;
        auto columns = (const uint16_t*)pages[page] + at;
        const char* later = pages[page + kFar];  // null after the last one
        const Ahead soon = later ? Ahead{(const uint8_t*)later + at * page_bytes / a.page, page_bytes * 16 / a.page / pairs} : Ahead{};
        for (int64_t d = 0; d < pairs; d++) {
          if (2 * d >= a.head_dim) {
            _mm512_store_si512(keys + d * kPanel * 4 + half * 4, _mm512_setzero_si512());
            continue;
          }
          soon.fetch(d);
          const uint16_t* even = columns + 2 * d * a.page;
          pair_rows(even, 2 * d + 1 < a.head_dim ? even + a.page : nullptr, keys + d * kPanel * 4 + half * 4);
        }
      }
      (height > kMatrixRows ? matrix_pass<true, 2> : matrix_pass<false, 2>)(keys, {q, row_bytes, 2 * kPartBytes}, kMatrixRows, steps, scores + first * kSplit + i, kSplit, true, {}, {});
    }
  }
}

// acc[r][d] = sum of weights[r * kSplit + i] times the value at i, for positions low <= i < high of the split. Changes the weights.
void matrix_values(const AttendArgs& a, int rows, const char* const* pages, int64_t base, int low, int high, float* weights, float* acc) {
  alignas(64) uint8_t values[kSplit * kPanel * 2];
  alignas(64) float tile[kMatrixPass * kPanel];
  const int begin = low / 32 * 32, end = (high + 31) / 32 * 32, steps = (end - begin) / 32;
  for (int r = 0; r < rows; r++) {
    float* p = weights + r * kSplit;
    std::fill(p + begin, p + low, 0.0f), std::fill(p + high, p + end, 0.0f);
    for (int i = begin; i < end; i += 32) {
      const __m512 x[2] = {_mm512_load_ps(p + i), _mm512_load_ps(p + i + 16)};
      divide_step(x, p + i);
    }
  }
  MatrixRegisters registers;
  for (int c = 0; c < a.v_stride; c += kPanel) {
    const int width = std::min(kPanel, a.v_stride - c);  // 16 or 32
    for (int i = begin; i < end; i += 2) {
      uint8_t* to = values + (i - begin) * kPanel * 2;
      auto row = [&](int j) {
        return j < low || j >= high ? nullptr : (const uint16_t*)pages[(j - base) / a.page] + (j - base) % a.page * a.v_stride + c;
      };
      const uint16_t *even = row(i), *odd = row(i + 1);
      if (const char* soon = c ? nullptr : pages[(i - base) / a.page + kFar])
        for (int64_t b = 0; b < a.v_stride * 4; b += 64) __builtin_prefetch(soon + (i - base) % a.page * a.v_stride * 2 + b, 0, 2);
      for (int half = 0; half < kPanel; half += 16) {
        if (half >= width || !(even || odd)) _mm512_store_si512(to + half * 4, _mm512_setzero_si512());
        else if (even) pair_rows(even + half, odd ? odd + half : nullptr, to + half * 4);
        else _mm512_store_si512(to + half * 4, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(odd + half))), 16));
      }
    }
    for (int64_t first = 0; first < rows; first += kMatrixPass) {
      const int64_t height = std::min<int64_t>(kMatrixPass, rows - first);
      registers.shape(height, kMatrixRows);
      const RowsAt x{(const uint8_t*)(weights + first * kSplit + begin), kSplit * 4, 2 * kPartBytes};
      (height > kMatrixRows ? matrix_pass<true, 2> : matrix_pass<false, 2>)(values, x, kMatrixRows, steps, tile, kPanel, true, {}, {});
      for (int64_t r = 0; r < height; r++) std::memcpy(acc + (first + r) * a.v_stride + c, tile + r * kPanel, size_t(width) * 4);
    }
  }
}

#else

bool attends_by_matrix_unit(const AttendArgs&) { return false; }
void matrix_scores(const AttendArgs&, const float* const*, int, const char* const*, int64_t, int, int, float*) {}
void matrix_values(const AttendArgs&, int, const char* const*, int64_t, int, int, float*, float*) {}

#endif
