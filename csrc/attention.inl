// Attention over pages. A split is 512 positions at fixed boundaries: its scores are all computed, then its maximum,
// its sum and its weighted values; splits merge in ascending order. Each score is one chain over head_dim, each value
// one chain over positions, so chunking and batching cannot change a row's bits; masked positions weigh exactly zero.

template <bool Bf16>
inline F load_cache(const void* p, int64_t i) {
  if constexpr (Bf16) return load_bf16((const uint16_t*)p + i);
  else return load((const float*)p + i);
}

// scores[r][0 .. NV * N) = q_r . K columns; K is [head_dim][page].
template <bool Bf16, int RB, int NV>
void score_tile(const float* const* q, const void* k, int64_t at, int page, int head_dim, float* const* scores) {
  F acc[RB][NV];
  for (auto& row : acc)
    for (F& x : row) x = set(0);
  for (int d = 0; d < head_dim; d++) {
    F key[NV];
    EACH_OF for (int v = 0; v < NV; v++) key[v] = load_cache<Bf16>(k, at + int64_t(d) * page + v * F::N);
    EACH_OF for (int r = 0; r < RB; r++)
      EACH_OF for (int v = 0; v < NV; v++) acc[r][v] = fma(set(q[r][d]), key[v], acc[r][v]);
  }
  EACH_OF for (int r = 0; r < RB; r++)
    EACH_OF for (int v = 0; v < NV; v++) store(scores[r] + v * F::N, acc[r][v]);
}

// acc[r][0 .. NV * N) += sum over n positions of p[r][i] * V[i]; V is [positions][stride].
template <bool Bf16, int RB, int NV>
void value_tile(const float* const* p, const void* v, int64_t at, int stride, int n, float* const* acc) {
  F a[RB][NV];
  EACH_OF for (int r = 0; r < RB; r++)
    EACH_OF for (int j = 0; j < NV; j++) a[r][j] = load(acc[r] + j * F::N);
  for (int i = 0; i < n; i++) {
    F value[NV];
    EACH_OF for (int j = 0; j < NV; j++) value[j] = load_cache<Bf16>(v, at + int64_t(i) * stride + j * F::N);
    EACH_OF for (int r = 0; r < RB; r++)
      EACH_OF for (int j = 0; j < NV; j++) a[r][j] = fma(set(p[r][i]), value[j], a[r][j]);
  }
  EACH_OF for (int r = 0; r < RB; r++)
    EACH_OF for (int j = 0; j < NV; j++) store(acc[r] + j * F::N, a[r][j]);
}

constexpr int kBlock = F::N == 16 ? 4 : 2;  // query rows held in registers

// Calls f<RB>(first) over `rows` in blocks of kBlock, the rest one by one.
template <class Fn>
void by_block(int rows, Fn f) {
  int r = 0;
  for (; r + kBlock <= rows; r += kBlock) f.template operator()<kBlock>(r);
  for (; r < rows; r++) f.template operator()<1>(r);
}

template <bool Bf16>
void scores_of_page(const AttendArgs& a, const float* const* q, int rows, int64_t base, int from, int to, float* const* scores) {
  constexpr int wide = kPanel / F::N, narrow = 16 / F::N;
  for (int t = from; t < to;) {
    bool full = t + kPanel <= to;
    by_block(rows, [&]<int RB>(int r) {
      float* out[RB];
      for (int i = 0; i < RB; i++) out[i] = scores[r + i] + (t - from);
      if (full) score_tile<Bf16, RB, wide>(q + r, a.k, base + t, a.page, a.head_dim, out);
      else score_tile<Bf16, RB, narrow>(q + r, a.k, base + t, a.page, a.head_dim, out);
    });
    t += full ? kPanel : 16;
  }
}

template <bool Bf16>
void values_of_page(const AttendArgs& a, const float* const* p, int rows, int64_t base, int n, float* acc) {
  constexpr int wide = F::N == 16 ? 4 : 2;
  for (int d = 0; d < a.v_stride;) {
    bool full = d + wide * F::N <= a.v_stride;
    by_block(rows, [&]<int RB>(int r) {
      float* out[RB];
      for (int i = 0; i < RB; i++) out[i] = acc + (r + i) * a.v_stride + d;
      if (full) value_tile<Bf16, RB, wide>(p + r, a.v, base + d, a.v_stride, n, out);
      else value_tile<Bf16, RB, 1>(p + r, a.v, base + d, a.v_stride, n, out);
    });
    d += (full ? wide : 1) * F::N;
  }
}

// scale, softcap, mask outside [low, high), then p = exp(s - max) in place over [begin, end): the maximum and the sum.
void softmax_row(const AttendArgs& a, float* s, int begin, int end, int low, int high, float* top, float* total) {
  for (int i = begin; i < low; i++) s[i] = -INFINITY;
  for (int i = high; i < end; i++) s[i] = -INFINITY;
  F peak = set(-INFINITY);
  for (int i = begin; i < end; i += F::N) {
    F x = load(s + i);
    F y = x * set(a.scale);
    if (a.softcap > 0) y = if_less(x, set(-3e38f), x, tanh(y / set(a.softcap)) * set(a.softcap));
    store(s + i, y);
    peak = max(peak, y);
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

template <bool Bf16>
void split_of(const AttendArgs& a, const Query& q, int64_t split, float* scratch, float* top, float* total, float* acc) {
  const int share = a.heads / a.kv_heads, rows = q.tokens * share;
  const int64_t start = split * kSplit, last = q.position + q.tokens;
  const int64_t low = std::max(start, a.window ? std::max<int64_t>(0, q.position - a.window + 1) : 0);
  const int64_t high = std::min(start + kSplit, last);
  std::memset(acc, 0, size_t(rows) * a.v_stride * 4);
  for (int r = 0; r < rows; r++) top[r] = -INFINITY, total[r] = 0;
  if (low >= high) return;

  const float* query[kMaxTaskRows];
  float* scores[kMaxTaskRows];
  const float* weights[kMaxTaskRows];
  for (int r = 0; r < rows; r++)
    query[r] = a.q + (q.first_row + r / share) * a.ld_q + (q.kv_head * share + r % share) * int64_t(a.head_dim);
  const int64_t begin = low / 16 * 16, end = (high + 15) / 16 * 16;
  for (int64_t t = begin; t < end;) {
    int64_t page = t / a.page, next = std::min(end, (page + 1) * a.page);
    int64_t base = (int64_t(q.blocks[page]) * a.kv_heads + q.kv_head) * a.head_dim * a.page;
    for (int r = 0; r < rows; r++) scores[r] = scratch + r * kSplit + (t - start);
    scores_of_page<Bf16>(a, query, rows, base, int(t - page * a.page), int(next - page * a.page), scores);
    t = next;
  }
  for (int r = 0; r < rows; r++) {
    int64_t position = q.position + r / share;
    int64_t own = std::max(low, a.window ? position - a.window + 1 : 0), stop = std::min(high, position + 1);
    float* s = scratch + r * kSplit;
    if (own < stop)
      softmax_row(a, s, int(begin - start), int(end - start), int(own - start), int(stop - start), top + r, total + r);
    else
      std::memset(s + (begin - start), 0, size_t(end - begin) * 4);
  }
  for (int64_t t = low; t < high;) {
    int64_t page = t / a.page, next = std::min(high, (page + 1) * a.page);
    int64_t base = ((int64_t(q.blocks[page]) * a.kv_heads + q.kv_head) * a.page + (t - page * a.page)) * a.v_stride;
    for (int r = 0; r < rows; r++) weights[r] = scratch + r * kSplit + (t - start);
    values_of_page<Bf16>(a, weights, rows, base, int(next - t), acc);
    t = next;
  }
}

void attend_split(const AttendArgs& a, const Query& q, int64_t split, float* scratch, float* top, float* total, float* acc) {
  if (a.bf16) split_of<true>(a, q, split, scratch, top, total, acc);
  else split_of<false>(a, q, split, scratch, top, total, acc);
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
