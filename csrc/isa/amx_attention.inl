// Attention to a BF16 cache by the matrix unit of Intel CPUs (AMX): scores and weighted values of a split. The unit multiplies pairs
// of bf16 values and adds the two products. But a pair in the cache holds two different results' operands: keys of two positions, or
// two columns of the values. So a query or weight x is paired with a zero: (x, 0) takes the first of a pair in the cache, (0, x) the
// second, and the cache is read as it is. x is a float, held as two bf16 values (16 to 17 bits); so each x has four pairs, and with
// few query rows all four fit in one register.

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)

// The unit reads 16 rows of 64 bytes: 32 positions of the keys, or 32 columns of the values.
bool attends_by_matrix_unit(const AttendArgs& a) {
  return a.format == Fmt::BF16 && !a.latent && !a.rope && !a.chosen && a.page % 32 == 0 && a.head_dim % 16 == 0 && a.v_stride >= 32;
}

constexpr int kForms = 4;  // rows of the unit's first operand for a query row
constexpr int kPassQueries = kMatrixPass / kForms, kMostPasses = kTaskRows / kPassQueries;
constexpr int kStep = 16;  // positions or columns that an instruction adds up
constexpr int kChunk = 4;  // steps of weights that are divided at a time: 64 positions
constexpr int64_t kFormBytes = kMatrixPass * 64;  // of a step of a pass
constexpr int64_t kAhead = 12 << 10;  // prefetch distance in bytes: what is fetched and what is used stay in L1

// 16 floats in the forms (large, 0), (small, 0), (0, large), (0, small), 64 bytes each; large + small = x up to 2^-17 of it.
inline void divide_step(__m512 x, uint8_t* to) {
  auto wide = [](__m512 y) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(y)); };
  const __m512i large = wide(x), held = _mm512_slli_epi32(large, 16), small = wide(_mm512_sub_ps(x, _mm512_castsi512_ps(held)));
  _mm512_store_si512(to, large), _mm512_store_si512(to + 64, small);
  _mm512_store_si512(to + 128, held), _mm512_store_si512(to + 192, _mm512_slli_epi32(small, 16));
}

int64_t pages_ahead(int64_t page_bytes) { return std::clamp<int64_t>(kAhead / page_bytes, 1, kMostFar); }

// Rows of 32 values of the cache, 16 for each step, and later data, of which each step prefetches `bytes`.
struct CacheRows {
  const uint8_t *at[kMaxHead / kStep], *later[kMaxHead / kStep];
  int64_t stride, bytes;  // stride: from a row to the next
  void fetch(int step) const {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(later[step] + b, 0, 3);
  }
};

// c[row][0 .. 15] += products with the rows of `left`, and with Right c[row][16 .. 31] those with `right`: sums of the even values for
// the first two forms, of the odd values for the others. x: [steps][height][16 pairs].
template <bool Lower, bool Right>  // Lower: height > 16
void forms_pass(const uint8_t* x, int64_t height, const CacheRows& left, const CacheRows& right, int steps, float* c, bool first) {
  constexpr int64_t stride = kPanel * 4;
  float* lower = c + kMatrixRows * kPanel;
  if (first) {
    clear_matrix<0>();
    if constexpr (Right) clear_matrix<1>();
    if constexpr (Lower) clear_matrix<2>();
    if constexpr (Lower && Right) clear_matrix<3>();
  } else {
    load_matrix<0>(c, stride);
    if constexpr (Right) load_matrix<1>(c + 16, stride);
    if constexpr (Lower) load_matrix<2>(lower, stride);
    if constexpr (Lower && Right) load_matrix<3>(lower + 16, stride);
  }
  for (int s = 0; s < steps; s++, x += height * 64) {
    load_matrix<4>(x, 64), load_matrix<6>(left.at[s], left.stride);
    add_bf16_products<0, 4, 6>();
    left.fetch(s);
    if constexpr (Right) {
      load_matrix<7>(right.at[s], right.stride);
      add_bf16_products<1, 4, 7>();
      right.fetch(s);
    }
    if constexpr (Lower) {
      load_matrix<5>(x + kMatrixRows * 64, 64);
      add_bf16_products<2, 5, 6>();
      if constexpr (Right) add_bf16_products<3, 5, 7>();
    }
  }
  store_matrix<0>(c, stride);
  if constexpr (Right) store_matrix<1>(c + 16, stride);
  if constexpr (Lower) store_matrix<2>(lower, stride);
  if constexpr (Lower && Right) store_matrix<3>(lower + 16, stride);
}

void add_forms(const uint8_t* x, int64_t height, const CacheRows (&sides)[2], bool both, int steps, float* c, bool first) {
  auto with = [&](auto pass) { pass(x, height, sides[0], sides[1], steps, c, first); };
  if (height > kMatrixRows) both ? with(forms_pass<true, true>) : with(forms_pass<true, false>);
  else both ? with(forms_pass<false, true>) : with(forms_pass<false, false>);
}

// A query row's results for 32 positions or columns.
inline void join_forms(const float* c, float* to) {
  const __m512 even = _mm512_add_ps(_mm512_load_ps(c), _mm512_load_ps(c + kPanel));
  const __m512 odd = _mm512_add_ps(_mm512_load_ps(c + 2 * kPanel), _mm512_load_ps(c + 3 * kPanel));
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  _mm512_storeu_ps(to, _mm512_permutex2var_ps(even, low, odd));
  _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), odd));
}

// scores[r * kSplit + i] = query r times the key at i, for positions low <= i < high of the split; and some values in the rest of
// the blocks of 32 positions. `base`: position of the first page, both counted from the split's start.
void matrix_scores(const AttendArgs& a, const float* const* query, int rows, const char* const* pages, int64_t base, int low, int high, float* scores) {
  alignas(64) uint8_t forms[kMostPasses * kMaxHead / kStep * kFormBytes], staged[2][kMaxHead * 64];
  alignas(64) float tile[kMatrixPass * kPanel];
  const int steps = a.head_dim / kStep;
  const int64_t page_bytes = a.block_bytes(a.head_dim), far = pages_ahead(page_bytes);
  MatrixRegisters registers;
  // Copies a block of 32 positions, with zeros at those outside [low, high).
  auto stage = [&](int block, uint8_t* to) {
    for (int half = block; half < block + 32; half += 16, to += 32) {
      const __mmask16 own = __mmask16(first_lanes(high - half)) & ~__mmask16(first_lanes(low - half));
      const char* page = own ? pages[(half - base) / a.page] + (half - base) % a.page * 2 : nullptr;
      for (int d = 0; d < a.head_dim; d++)
        _mm256_store_si256((__m256i*)(to + d * 64), own ? _mm256_maskz_loadu_epi16(own, page + int64_t(d) * a.page * 2) : __m256i{});
    }
  };
  // Whether the keys of a position outside [low, high), which are the neighbours of others, have an infinity or NaN: 0 times these is NaN.
  auto infinite = [&](int i) {
    auto column = (const uint16_t*)pages[(i - base) / a.page] + (i - base) % a.page;
    bool any = false;
    for (int64_t d = 0; d < a.head_dim; d++) any |= (column[d * a.page] & 0x7f80) == 0x7f80;
    return any;
  };
  auto place = [&](int block, bool fetches, uint8_t* copy, CacheRows& out) {
    const bool cut = (low > block && low % 2 && infinite(low - 1)) || (high < block + 32 && high % 2 && infinite(high));
    const int64_t page = (block - base) / a.page, at = (block - base) % a.page;
    if (cut) stage(block, copy);
    const uint8_t* first = cut ? copy : (const uint8_t*)pages[page] + at * 2;
    const char* later = fetches ? pages[page + far] : nullptr;  // null after the last one
    out.stride = cut ? 64 : a.page * 2, out.bytes = later ? page_bytes * 32 / a.page / steps : 0;
    for (int s = 0; s < steps; s++)
      out.at[s] = first + s * kStep * out.stride, out.later[s] = (const uint8_t*)later + at * page_bytes / a.page + s * out.bytes;
  };
  for (int top = 0; top < rows; top += kTaskRows) {
    const int group = std::min(kTaskRows, rows - top);
    for (int r = 0; r < group; r++) {
      const int pass = r / kPassQueries, height = std::min(kPassQueries, group - pass * kPassQueries) * kForms;
      for (int s = 0; s < steps; s++)
        divide_step(_mm512_loadu_ps(query[top + r] + s * kStep), forms + pass * steps * kFormBytes + (s * height + r % kPassQueries * kForms) * 64);
    }
    for (int i = low / 32 * 32; i < high; i += 64) {
      const bool both = i + 32 < high;
      CacheRows sides[2];
      for (int side = 0; side <= both; side++) place(i + 32 * side, top == 0, staged[side], sides[side]);
      for (int pass = 0; pass * kPassQueries < group; pass++) {
        const int queries = std::min(kPassQueries, group - pass * kPassQueries);
        registers.shape(queries * kForms, kMatrixRows);
        add_forms(forms + pass * steps * kFormBytes, queries * kForms, sides, both, steps, tile, true);
        for (int r = 0; r < queries; r++)
          for (int side = 0; side <= both; side++)
            join_forms(tile + r * kForms * kPanel + 16 * side, scores + (top + pass * kPassQueries + r) * kSplit + i + 32 * side);
        sides[0].bytes = sides[1].bytes = 0;
      }
    }
  }
}

// acc[r][d] = sum of weights[r * kSplit + i] times the value at i, for positions low <= i < high of the split. Changes the weights.
void matrix_values(const AttendArgs& a, int rows, const char* const* pages, int64_t base, int low, int high, float* weights, float* acc) {
  alignas(64) uint8_t forms[kChunk * kFormBytes], staged[2][kStep * kMaxHead * 2];
  alignas(64) float tiles[kMostPasses * (kMaxHead / 64) * kMatrixPass * kPanel];
  const int begin = low / kStep * kStep, end = (high + kStep - 1) / kStep * kStep, groups = (a.v_stride + 63) / 64;
  const int64_t stride = a.v_stride * 2, part = kStep * stride / ((a.v_stride + 31) / 32), far = pages_ahead(a.page * stride);
  auto row = [&](int i, int ahead) {
    const char* page = pages[(i - base) / a.page + ahead];
    return page ? (const uint8_t*)page + (i - base) % a.page * stride : nullptr;
  };
  // Where the 16 rows of a step are: a copy with zeros, where NaN may be, if some are outside [low, high).
  auto place = [&](int i) {
    const uint8_t* from = row(i, 0);
    if (i >= low && i + kStep <= high) return from;
    uint8_t* copy = staged[i < low];
    const int skip = std::max(low - i, 0), stop = std::min(high - i, kStep);
    std::memset(copy, 0, size_t(kStep * stride));
    std::memcpy(copy + skip * stride, from + skip * stride, size_t((stop - skip) * stride));
    return (const uint8_t*)copy;
  };
  for (int r = 0; r < rows; r++) {
    float* p = weights + r * kSplit;
    std::fill(p + begin, p + low, 0.0f), std::fill(p + high, p + end, 0.0f);
  }
  MatrixRegisters registers;
  for (int top = 0; top < rows; top += kTaskRows)
    for (int chunk = begin; chunk < end; chunk += kChunk * kStep) {
      const int steps = std::min(kChunk, (end - chunk) / kStep), group = std::min(kTaskRows, rows - top);
      const uint8_t *at[kChunk], *later[kChunk];
      for (int s = 0; s < steps; s++) {
        at[s] = place(chunk + s * kStep), later[s] = row(chunk + s * kStep, far);
        if (!later[s]) later[s] = row(chunk + s * kStep, 0);
      }
      for (int first = 0; first < group; first += kPassQueries) {
        const int queries = std::min(kPassQueries, group - first), height = queries * kForms;
        for (int s = 0; s < steps; s++)
          for (int r = 0; r < queries; r++)
            divide_step(_mm512_load_ps(weights + (top + first + r) * kSplit + chunk + s * kStep), forms + (s * height + r * kForms) * 64);
        registers.shape(height, kMatrixRows);
        for (int g = 0; g < groups; g++) {
          float* tile = tiles + (first / kPassQueries * groups + g) * kMatrixPass * kPanel;
          const bool both = g * 64 + 32 < a.v_stride;
          const int columns[2] = {std::min(g * 64, a.v_stride - 32), std::min(g * 64 + 32, a.v_stride - 32)};
          CacheRows sides[2];
          for (int side = 0; side <= both; side++) {  // each side of each group fetches its part of later rows
            sides[side].stride = stride, sides[side].bytes = top + first == 0 ? part : 0;
            for (int s = 0; s < steps; s++)
              sides[side].at[s] = at[s] + columns[side] * 2, sides[side].later[s] = later[s] + (2 * g + side) * part;
          }
          add_forms(forms, height, sides, both, steps, tile, chunk == begin);
          if (chunk + steps * kStep < end) continue;
          for (int r = 0; r < queries; r++)
            for (int side = 0; side <= both; side++)
              join_forms(tile + r * kForms * kPanel + 16 * side, acc + (top + first + r) * a.v_stride + columns[side]);
        }
      }
    }
}

#else

bool attends_by_matrix_unit(const AttendArgs&) { return false; }
void matrix_scores(const AttendArgs&, const float* const*, int, const char* const*, int64_t, int, int, float*) {}
void matrix_values(const AttendArgs&, int, const char* const*, int64_t, int, int, float*, float*) {}

#endif
