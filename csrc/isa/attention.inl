// Attention over a paged K/V cache, and the scores of the indexer of sparse attention. Keys are divided into fixed splits of 512
// positions. A split computes all its scores, then their maximum, sum of weights and weighted values; splits are merged in
// ascending order. Each score is one chain of additions over head_dim, each output value one chain over positions, and masked
// positions have weight 0, so a row's bits do not depend on chunking or batch. Chosen positions (sparse attention) are processed
// alone where they are few, in an order that leaves every sum as it is.

template <Fmt C>
inline F load_cache(const void* p, int64_t i) {
  if constexpr (C == Fmt::BF16) return load_bf16((const uint16_t*)p + i);
  else if constexpr (C == Fmt::I8) return to_float(load_i8((const int8_t*)p + i));
  else if constexpr (C == Fmt::FP8) return load_e4m3_row((const uint8_t*)p + i);
  else return load((const float*)p + i);
}

// A later block of the cache that is prefetched while this one is processed, a part in each step. Blocks are scattered, and
// hardware prefetching stops at the end of a memory page.
struct Prefetch {
  const char* at;
  int64_t step;
  void fetch(int64_t i) const {
    for (int64_t b = 0; b < step; b += 64) __builtin_prefetch(at + i * step + b, 0, 2);
  }
};

// Further columns of the keys, from a second cache (latent attention).
struct ExtraKeys {
  const void* at;
  const uint16_t* scales;
  int dim;
};

// scores[r][0 .. NV * N) = q_r . K for NV * N positions. K is [head_dim][page]; in I8 each position has a scale. The columns
// of `more`, if any, follow after head_dim.
template <Fmt C, int RB, int NV>
void score_tile(const float* const* q, const void* k, const uint16_t* scales, int page, int head_dim, const ExtraKeys& more, float* const* scores, Prefetch soon) {
  F acc[RB][NV];
  EACH_OF for (int r = 0; r < RB; r++)
    EACH_OF for (int v = 0; v < NV; v++) acc[r][v] = set(0);
  for (int d = 0; d < head_dim; d++) {
    F key[NV];
    soon.fetch(d);
    EACH_OF for (int v = 0; v < NV; v++) key[v] = load_cache<C>(k, int64_t(d) * page + v * F::N);
    EACH_OF for (int r = 0; r < RB; r++)
      EACH_OF for (int v = 0; v < NV; v++) acc[r][v] = fma(set(q[r][d]), key[v], acc[r][v]);
  }
  if (C == Fmt::I8)
    EACH_OF for (int v = 0; v < NV; v++) {
      const F scale = load_bf16(scales + v * F::N);
      EACH_OF for (int r = 0; r < RB; r++) acc[r][v] = acc[r][v] * scale;
    }
  for (int d = 0; d < more.dim; d++) {
    F key[NV];
    EACH_OF for (int v = 0; v < NV; v++) {
      key[v] = load_cache<C>(more.at, int64_t(d) * page + v * F::N);
      if (C == Fmt::I8) key[v] = key[v] * load_bf16(more.scales + v * F::N);
    }
    EACH_OF for (int r = 0; r < RB; r++)
      EACH_OF for (int v = 0; v < NV; v++) acc[r][v] = fma(set(q[r][head_dim + d]), key[v], acc[r][v]);
  }
  EACH_OF for (int r = 0; r < RB; r++)
    EACH_OF for (int v = 0; v < NV; v++) store(scores[r] + v * F::N, acc[r][v]);
}

// acc[r][0 .. NV * N) += sum over i < n of p[r][i] * V[i]; V is [positions][stride].
template <Fmt C, int RB, int NV>
void value_tile(const float* const* p, const void* v, int stride, int n, float* const* acc, Prefetch soon) {
  F a[RB][NV];
  EACH_OF for (int r = 0; r < RB; r++)
    EACH_OF for (int j = 0; j < NV; j++) a[r][j] = load(acc[r] + j * F::N);
  for (int i = 0; i < n; i++) {
    F value[NV];
    soon.fetch(i);
    EACH_OF for (int j = 0; j < NV; j++) value[j] = load_cache<C>(v, int64_t(i) * stride + j * F::N);
    EACH_OF for (int r = 0; r < RB; r++)
      EACH_OF for (int j = 0; j < NV; j++) a[r][j] = fma(set(p[r][i]), value[j], a[r][j]);
  }
  EACH_OF for (int r = 0; r < RB; r++)
    EACH_OF for (int j = 0; j < NV; j++) store(acc[r] + j * F::N, a[r][j]);
}

// acc[r][0] = sum over positions [from, to) of a split of p[r][i] * K[d][i], for values that are columns of the keys (latent
// attention). Vector lanes run over positions, so the order of additions depends only on these. p is 0 at masked positions;
// positions from `to` on, which may be unwritten, are not read.
template <Fmt C, int RB>
void latent_tile(const float* const* p, const char* const* pages, int64_t column, int page, int from, int to, float* const* acc) {
  F a[RB];
  EACH_OF for (int r = 0; r < RB; r++) a[r] = set(0);
  for (int i = from / F::N * F::N; i < to; i += F::N) {
    const void* k = pages[i / page];
    F key = load_cache<C>(k, column + i % page);
    if (i + F::N > to) {
      float all[F::N], own[F::N] = {};
      store(all, key);
      std::memcpy(own, all, size_t(to - i) * 4);
      key = load(own);
    }
    EACH_OF for (int r = 0; r < RB; r++) a[r] = fma(load(p[r] + i), key, a[r]);
  }
  EACH_OF for (int r = 0; r < RB; r++) *acc[r] = sum(a[r]);
}

constexpr int kBlock = F::N == 16 ? 8 : 2;  // query rows whose sums fill the registers
constexpr int kWide = kPanel / F::N, kNarrow = 16 / F::N;

// Calls f<RB, NV>(row, column) over rows x columns in tiles as large as the registers hold; columns are a multiple of 16.
template <class Fn>
void by_tile(int rows, int columns, Fn f) {
  for (int c = 0; c < columns; c += c + kPanel <= columns ? kPanel : 16)
    for (int r = 0; r < rows; r += kBlock)
      with_rows<kBlock>(std::min(kBlock, rows - r), [&]<int RB>() {
        if (c + kPanel <= columns) f.template operator()<RB, kWide>(r, c);
        else f.template operator()<RB, kNarrow>(r, c);
      });
}

constexpr int kFar = 2;      // prefetch distance in blocks: 8 KiB of bf16 with heads of 64
constexpr int kMostFar = 4;  // and of the matrix unit, at most

// The part of a block of `bytes` that a tile prefetches in `steps` steps: tiles of the first rows fetch all of it, divided
// among their columns.
inline Prefetch prefetch_part(const char* block, int64_t bytes, int row, int column, int columns, int width, int steps) {
  if (row || !block) return {block, 0};
  return {block + bytes * column / columns, (bytes * width / columns + steps - 1) / steps};
}

// Adds a linear bias to scores [begin, end): slope * (i - at), where `at` is the query's position, counted as i is.
void add_slope(float slope, int64_t at, float* s, int begin, int end) {
  for (int i = begin; i < end; i++) s[i] += slope * float(i - at);
}

// Turns scores [begin, end) into weights in place: times `scale`, softcap, times `temperature`, the linear bias of `slope` for a query
// at `at`, mask outside [low, high), p = exp(s - max). Returns the maximum in top and the sum of weights in total.
void softmax_row(const AttendArgs& a, float scale, float temperature, float slope, int64_t at, float* s, int begin, int end, int low, int high, float* top, float* total) {
  for (int i = begin; i < low; i++) s[i] = -INFINITY;
  for (int i = high; i < end; i++) s[i] = -INFINITY;
  F peak = set(-INFINITY);
  for (int i = begin; i < end; i += F::N) {
    F x = load(s + i);
    F y = x * set(scale);
    if (a.softcap > 0) y = if_less(x, set(-3e38f), x, tanh(y / set(a.softcap)) * set(a.softcap));
    if (temperature != 1) y = y * set(temperature);
    store(s + i, y);
    if (slope == 0) peak = max(peak, y);
  }
  if (slope != 0) {
    add_slope(slope, at, s, low, high);  // masked scores stay as they are
    for (int i = begin; i < end; i += F::N) peak = max(peak, load(s + i));
  }
  *top = largest(peak);
  F sums = set(0);
  for (int i = begin; i < end; i += F::N) {
    F p = exp(load(s + i) - set(*top));
    store(s + i, p);
    sums = sums + p;
  }
  *total = sum(sums);
}

// Masks the scores of the positions [low, high) that are not among the ascending ones in `chosen`, where score 0 is that of
// position `start`. Returns false if none of them is.
bool keep_chosen(const int32_t* chosen, int64_t count, int64_t start, int64_t low, int64_t high, float* s) {
  const int32_t *end = chosen + count, *next = std::lower_bound(chosen, end, int32_t(low));
  if (next == end || *next >= high) return false;
  for (int64_t i = low; i < high; i++)
    if (next != end && *next == i) next++;
    else s[i - start] = -INFINITY;
  return true;
}

// The positions that one token chose in a split, each in a slot. A slot and its position have the same remainder modulo F::N,
// and of two positions with the same remainder the lower one has the lower slot. So sums over slots by vectors add the same
// values in the same order as sums over all positions of the split, where the positions between weigh 0.
struct Slots {
  const int32_t* positions;  // ascending
  int count, width;          // width: number of slots, a multiple of 16; some may be empty
  int used[F::N];            // of the slots with each remainder, the first ones
  int16_t slot[kSplit];      // by position
};

// Fills `out` with the positions in [low, high) of the list of token row `row`.
void place_chosen(const AttendArgs& a, int64_t row, int64_t low, int64_t high, Slots& out) {
  const int32_t *list = a.chosen + row * a.ld_chosen, *first = std::lower_bound(list, list + a.count, int32_t(low));
  out.positions = first;
  out.count = int(std::lower_bound(first, list + a.count, int32_t(high)) - first);
  std::fill(out.used, out.used + F::N, 0);
  for (int i = 0; i < out.count; i++) {
    const int lane = first[i] % F::N;
    out.slot[i] = int16_t(out.used[lane]++ * F::N + lane);
  }
  out.width = (*std::max_element(out.used, out.used + F::N) * F::N + 15) / 16 * 16;
}

// Copies the chosen positions of a head's pages, [width][page] as in the cache of keys, to one page of c.width tokens at `to`.
// Empty slots are 0. `head`: number of the head's block in a page; `heads`: blocks of a page.
template <Fmt C>
void gather_keys(const AttendArgs& a, const Query& q, const Slots& c, const void* cache, int width, int64_t head, int64_t heads, char* to) {
  using Value = std::conditional_t<cache_bytes(C) == 4, uint32_t, std::conditional_t<cache_bytes(C) == 2, uint16_t, uint8_t>>;
  constexpr int kColumns = 64;  // copied at a time for all positions, so that the target stays in the L1 cache
  std::memset(to, 0, size_t(block_bytes(C, width, c.width)));
  for (int begin = 0; begin < width; begin += kColumns)
    for (int i = 0; i < c.count; i++) {
      const char* page = (const char*)cache + (q.blocks[c.positions[i] / a.page] * heads + head) * a.block_bytes(width);
      const int at = c.positions[i] % a.page, end = std::min(width, begin + kColumns);
      const Value* from = (const Value*)page + at;
      Value* out = (Value*)to + c.slot[i];
      for (int d = begin; d < end; d++) out[int64_t(d) * c.width] = from[int64_t(d) * a.page];
      if (C == Fmt::I8 && begin == 0)
        ((uint16_t*)(to + int64_t(width) * c.width))[c.slot[i]] = ((const uint16_t*)(page + int64_t(width) * a.page))[at];
    }
}

float temperature_at(const AttendArgs& a, int64_t position) {
  return a.temper == 0 ? 1.0f : float(1 + a.temper * std::log1p(std::floor(double(position + a.temper_from) / a.temper_every)));
}

// As split_of, for one token that has few chosen positions in this split. Bits are the same.
template <Fmt C>
void split_of_chosen(const AttendArgs& a, const Query& q, int token, const Slots& c, float* scratch, float* top, float* total, float* acc) {
  constexpr int64_t each = cache_bytes(C);
  const int share = a.heads / a.kv_heads, width = c.width;
  std::memset(acc, 0, size_t(share) * a.v_stride * 4);
  std::fill(top, top + share, -INFINITY), std::fill(total, total + share, 0.0f);
  if (!c.count) return;
  const int64_t heads = a.one_head ? 1 : a.kv_heads, head = a.one_head ? 0 : q.kv_head;
  auto scales_of = [&](const char* block, int columns) { return (const uint16_t*)(block + int64_t(columns) * width * each); };
  char *keys = (char*)a.gathered, *ropes = keys + block_bytes(C, a.head_dim, width);
  gather_keys<C>(a, q, c, a.k, a.head_dim, head, heads, keys);
  if (a.rope) gather_keys<C>(a, q, c, a.rope, a.rope_dim, head, heads, ropes);

  const float *query[kMaxTaskRows], *weights[kMaxTaskRows];
  float* out[kMaxTaskRows];
  for (int r = 0; r < share; r++)
    query[r] = a.q + (q.first_row + token) * a.ld_q + (q.kv_head * share + r) * int64_t(a.head_dim + a.rope_dim);
  by_tile(share, width, [&]<int RB, int NV>(int r, int s) {
    for (int j = 0; j < RB; j++) out[j] = scratch + (r + j) * kSplit + s;
    const ExtraKeys more{ropes + s * each, scales_of(ropes, a.rope_dim) + s, a.rope_dim};
    score_tile<C, RB, NV>(query + r, keys + s * each, scales_of(keys, a.head_dim) + s, width, a.head_dim, more, out, {nullptr, 0});
  });
  const float scale = C == Fmt::FP8 ? a.scale * a.k_scale[head] : a.scale, temperature = temperature_at(a, q.position + token);
  for (int r = 0; r < share; r++) {
    float* s = scratch + r * kSplit;
    for (int i = 0; i < width; i++)
      if (i / F::N >= c.used[i % F::N]) s[i] = -INFINITY;
    softmax_row(a, scale, temperature, 0, 0, s, 0, width, 0, width, top + r, total + r);
  }
  if (a.latent) {
    const char* block = keys;
    for (int r = 0; r < share; r++) {
      weights[r] = scratch + r * kSplit;
      for (int s = 0; s < width && C == Fmt::I8; s += F::N)  // multiply the weights by the scales of the values
        store(scratch + r * kSplit + s, load(weights[r] + s) * load_bf16(scales_of(keys, a.head_dim) + s));
    }
    for (int d = 0; d < a.v_dim; d++)
      for (int r = 0; r < share; r += kBlock)
        with_rows<kBlock>(std::min(kBlock, share - r), [&]<int RB>() {
          float* to[RB];
          for (int j = 0; j < RB; j++) to[j] = acc + (r + j) * a.v_stride + d;
          latent_tile<C, RB>(weights + r, &block, int64_t(d) * width, width, 0, width, to);
        });
    return;
  }
  // Values, and their weights, in ascending order of positions.
  char* values = ropes + block_bytes(C, a.rope_dim, width);
  float* ordered = (float*)(values + int64_t(c.count) * a.v_stride * each);
  for (int i = 0; i < c.count; i++) {
    const int at = c.positions[i] % a.page;
    const char* page = (const char*)a.v + (q.blocks[c.positions[i] / a.page] * heads + head) * a.block_bytes(a.v_stride);
    std::memcpy(values + int64_t(i) * a.v_stride * each, page + int64_t(at) * a.v_stride * each, size_t(a.v_stride) * each);
    const float by = C == Fmt::I8 ? from_bf16(((const uint16_t*)(page + int64_t(a.v_stride) * a.page))[at]) : 1.0f;
    for (int r = 0; r < share; r++) ordered[r * c.count + i] = scratch[r * kSplit + c.slot[i]] * by;
  }
  by_tile(share, a.v_stride, [&]<int RB, int NV>(int r, int v) {
    for (int j = 0; j < RB; j++) weights[j] = ordered + (r + j) * c.count, out[j] = acc + (r + j) * a.v_stride + v;
    value_tile<C, RB, NV>(weights, values + v * each, a.v_stride, c.count, out, {nullptr, 0});
  });
}

// Computes a split by split_of_chosen() if each token's slots are at most half of the positions of the split that it sees, and
// returns true; else false.
template <Fmt C>
bool few_chosen(const AttendArgs& a, const Query& q, int64_t split, float* scratch, float* top, float* total, float* acc) {
  if (!a.chosen || a.slopes) return false;
  const int share = a.heads / a.kv_heads;
  const int64_t start = split * kSplit;
  Slots slots;
  for (const bool compute : {false, true})
    for (int t = 0; t < q.tokens; t++) {
      const int64_t low = std::max(start, a.reach.first(q.position + t)), high = std::min(start + kSplit, q.position + t + 1);
      place_chosen(a, q.first_row + t, low, high, slots);
      const int64_t r = int64_t(t) * share;
      if (compute) split_of_chosen<C>(a, q, t, slots, scratch, top + r, total + r, acc + r * a.v_stride);
      else if (2 * slots.width > high - low && slots.count) return false;
    }
  return true;
}

// The parts of a split that the matrix unit computes, for the instruction set that has one: amx_attention.inl.
bool attends_by_matrix_unit(const AttendArgs& a);
void matrix_scores(const AttendArgs& a, const float* const* query, int rows, const char* const* pages, int64_t base, int low, int high, float* scores);
void matrix_values(const AttendArgs& a, int rows, const char* const* pages, int64_t base, int low, int high, float* weights, float* acc);

template <Fmt C>
void split_of(const AttendArgs& a, const Query& q, int64_t split, float* scratch, float* top, float* total, float* acc) {
  if (few_chosen<C>(a, q, split, scratch, top, total, acc)) return;
  const int share = a.heads / a.kv_heads, rows = q.tokens * share;
  const int64_t start = split * kSplit, last = q.position + q.tokens;
  const int64_t low = std::max(start, a.reach.first(q.position));
  const int64_t high = std::min(start + kSplit, last);
  std::memset(acc, 0, size_t(rows) * a.v_stride * 4);
  for (int r = 0; r < rows; r++) top[r] = -INFINITY, total[r] = 0;
  if (low >= high) return;

  const float* query[kMaxTaskRows];
  float* out[kMaxTaskRows];
  for (int r = 0; r < rows; r++)
    query[r] = a.q + (q.first_row + r / share) * a.ld_q + (q.kv_head * share + r % share) * int64_t(a.head_dim + a.rope_dim);

  // The blocks in the order in which they are read: keys of all pages, then values of all pages.
  constexpr int64_t each = cache_bytes(C), most = kSplit / 16;
  const char *blocks[2 * most + kMostFar] = {}, *ropes[most] = {};
  const int64_t first = low / a.page, pages = (high - 1) / a.page + 1 - first;
  const int64_t key_bytes = a.block_bytes(a.head_dim), value_bytes = a.block_bytes(a.v_stride);
  auto scales_of = [&](const char* block, int width) { return (const uint16_t*)(block + int64_t(width) * a.page * each); };
  for (int64_t i = 0; i < pages; i++) {
    const int64_t block = q.blocks[first + i], at = a.one_head ? block : block * a.kv_heads + q.kv_head;
    blocks[i] = (const char*)a.k + at * key_bytes;
    if (!a.latent) blocks[pages + i] = (const char*)a.v + at * value_bytes;
    if (a.rope) ropes[i] = (const char*)a.rope + at * a.block_bytes(a.rope_dim);
  }

  const int64_t begin = low / 16 * 16, end = (high + 15) / 16 * 16, base = first * a.page - start;  // base: of the first page, <= 0
  const bool matrix = attends_by_matrix_unit(a);
  if (matrix) matrix_scores(a, query, rows, blocks, base, int(low - start), int(high - start), scratch);
  for (int64_t i = 0; i < pages && !matrix; i++) {
    const int64_t page = (first + i) * a.page, from = std::max(begin, page), to = std::min(end, page + a.page);
    const int64_t next = i + kFar < pages ? key_bytes : value_bytes;
    by_tile(rows, int(to - from), [&]<int RB, int NV>(int r, int c) {
      for (int j = 0; j < RB; j++) out[j] = scratch + (r + j) * kSplit + (from - start) + c;
      const int64_t at = from - page + c;
      const ExtraKeys more{ropes[i] + at * each, scales_of(ropes[i], a.rope_dim) + at, a.rope_dim};
      score_tile<C, RB, NV>(query + r, blocks[i] + at * each, scales_of(blocks[i], a.head_dim) + at, a.page, a.head_dim, more, out,
                            prefetch_part(blocks[i + kFar], next, r, c, int(to - from), NV * F::N, a.head_dim));
    });
  }
  const float scale = C == Fmt::FP8 ? a.scale * a.k_scale[a.one_head ? 0 : q.kv_head] : a.scale;
  for (int r = 0; r < rows; r++) {
    int64_t position = q.position + r / share;
    int64_t own = std::max(low, a.reach.first(position)), stop = std::min(high, position + 1);
    const float temperature = temperature_at(a, position);
    const float slope = a.slopes ? a.slopes[q.kv_head * share + r % share] : 0.0f;
    float* s = scratch + r * kSplit;
    const bool seen = own < stop && (!a.chosen || keep_chosen(a.chosen + (q.first_row + r / share) * a.ld_chosen, a.count, start, own, stop, s));
    if (seen)
      softmax_row(a, scale, temperature, slope, position - start, s, int(begin - start), int(end - start), int(own - start), int(stop - start), top + r, total + r);
    else
      std::memset(s + (begin - start), 0, size_t(end - begin) * 4);
  }
  if (matrix) return matrix_values(a, rows, blocks + pages, base, int(low - start), int(high - start), scratch, acc);
  if (a.latent) {
    for (int r = 0; r < rows; r++) {
      out[r] = scratch + r * kSplit + base;
      for (int64_t t = begin; t < high && C == Fmt::I8; t += F::N) {  // multiply the weights by the scales of the values
        float* p = out[r] + (t - start - base);
        store(p, load(p) * load_bf16(scales_of(blocks[t / a.page - first], a.head_dim) + t % a.page));
      }
      std::fill(out[r] + (high - start - base), out[r] + (end - start - base), 0.0f);  // there the scales may be unwritten
    }
    for (int d = 0; d < a.v_dim; d++)
      for (int r = 0; r < rows; r += kBlock)
        with_rows<kBlock>(std::min(kBlock, rows - r), [&]<int RB>() {
          float* to[RB];
          for (int j = 0; j < RB; j++) to[j] = acc + (r + j) * a.v_stride + d;
          latent_tile<C, RB>(out + r, blocks, int64_t(d) * a.page, a.page, int(begin - start - base), int(high - start - base), to);
        });
    return;
  }
  for (int64_t i = 0; i < pages; i++) {
    const int64_t page = (first + i) * a.page, from = std::max(low, page), to = std::min(high, page + a.page);
    if (C == Fmt::I8)  // multiply the weights by the scales of the values
      for (int r = 0; r < rows; r++)
        for (int64_t t = std::max(begin, page); t < std::min(end, page + a.page); t += F::N) {
          float* p = scratch + r * kSplit + (t - start);
          store(p, load(p) * load_bf16(scales_of(blocks[pages + i], a.v_stride) + (t - page)));
        }
    by_tile(rows, a.v_stride, [&]<int RB, int NV>(int r, int c) {
      const float* weights[RB];
      for (int j = 0; j < RB; j++) {
        weights[j] = scratch + (r + j) * kSplit + (from - start);
        out[j] = acc + (r + j) * a.v_stride + c;
      }
      value_tile<C, RB, NV>(weights, blocks[pages + i] + ((from - page) * a.v_stride + c) * each, a.v_stride, int(to - from),
                               out, prefetch_part(blocks[pages + i + kFar], value_bytes, r, c, a.v_stride, NV * F::N, int(to - from)));
    });
  }
}

void attend_split(const AttendArgs& a, const Query& q, int64_t split, float* scratch, float* top, float* total, float* acc) {
  if (a.format == Fmt::BF16) split_of<Fmt::BF16>(a, q, split, scratch, top, total, acc);
  else if (a.format == Fmt::I8) split_of<Fmt::I8>(a, q, split, scratch, top, total, acc);
  else if (a.format == Fmt::FP8) split_of<Fmt::FP8>(a, q, split, scratch, top, total, acc);
  else split_of<Fmt::F32>(a, q, split, scratch, top, total, acc);
}

void attend_merge(int64_t rows, int64_t width, float* top, float* total, float* acc, const float* t2, const float* l2, const float* a2) {
  for (int64_t r = 0; r < rows; r++) {
    if (t2[r] == -INFINITY) continue;
    float m = std::max(top[r], t2[r]);
    F s1 = exp(set(top[r] - m)), s2 = exp(set(t2[r] - m));
    float f1[F::N], f2[F::N];
    store(f1, s1), store(f2, s2);
    total[r] = total[r] * f1[0] + l2[r] * f2[0];
    for (int64_t d = 0; d < width; d += F::N)
      store(acc + r * width + d, load(acc + r * width + d) * s1 + load(a2 + r * width + d) * s2);
    top[r] = m;
  }
}

// The scores of all positions below `seen` for one token: see ChooseKeys in ops/indexer.py. Each product is one chain of
// additions over head_dim, each score one over heads. scores: whole pages.
constexpr int kIndexHeads = F::N == 16 ? 8 : 4;  // heads of which products are computed at a time
template <Fmt C>
void score_keys_of(const IndexArgs& a, const int32_t* blocks, const float* q, const float* weights, int64_t seen, float* scores) {
  constexpr int NV = 16 / F::N;
  const int64_t bytes = block_bytes(C, a.head_dim, a.page);
  for (int64_t page = 0; page * a.page < seen; page++) {
    const char* block = (const char*)a.keys + blocks[page] * bytes;
    const uint16_t* scales = (const uint16_t*)(block + int64_t(a.head_dim) * a.page * cache_bytes(C));
    for (int64_t at = 0; at < a.page; at += 16) {
      F total[NV];
      EACH_OF for (int v = 0; v < NV; v++) total[v] = set(0);
      for (int first = 0; first < a.heads; first += kIndexHeads)
        with_rows<kIndexHeads>(std::min(kIndexHeads, a.heads - first), [&]<int RB>() {
          float products[RB][16];
          const float* rows[RB];
          float* out[RB];
          for (int h = 0; h < RB; h++) rows[h] = q + int64_t(first + h) * a.head_dim, out[h] = products[h];
          score_tile<C, RB, NV>(rows, block + at * cache_bytes(C), scales + at, a.page, a.head_dim, {nullptr, nullptr, 0}, out, {nullptr, 0});
          for (int h = 0; h < RB; h++)
            EACH_OF for (int v = 0; v < NV; v++)
              total[v] = fma(max(set(0), load(products[h] + v * F::N) * set(a.scale)), set(weights[first + h]), total[v]);
        });
      EACH_OF for (int v = 0; v < NV; v++) store(scores + page * a.page + at + v * F::N, total[v]);
    }
  }
}

void score_keys(const IndexArgs& a, const int32_t* blocks, const float* q, const float* weights, int64_t seen, float* scores) {
  if (a.format == Fmt::BF16) score_keys_of<Fmt::BF16>(a, blocks, q, weights, seen, scores);
  else if (a.format == Fmt::I8) score_keys_of<Fmt::I8>(a, blocks, q, weights, seen, scores);
  else if (a.format == Fmt::FP8) score_keys_of<Fmt::FP8>(a, blocks, q, weights, seen, scores);
  else score_keys_of<Fmt::F32>(a, blocks, q, weights, seen, scores);
}
