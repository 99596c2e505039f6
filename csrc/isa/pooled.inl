// Attention over listed rows that are keys and values at once, and the pooling of runs of rows (DeepSeek-V4). Each score is one
// sum over head_dim in vector lanes, each output value one chain over the list, so bits depend on the list alone.

constexpr int kListRows = F::N == 16 ? 8 : 2;  // query rows whose sums fill the registers

template <Fmt C, int RB>
void list_scores(const ListArgs& a, const void* const* keys, int64_t n, const float* q, float* scores, int64_t padded) {
  for (int64_t i = 0; i < n; i++) {
    F acc[RB];
    EACH_OF for (int r = 0; r < RB; r++) acc[r] = set(0);
    for (int d = 0; d < a.stride; d += F::N) {
      const F key = load_cache<C>(keys[i], d);
      EACH_OF for (int r = 0; r < RB; r++) acc[r] = fma(load(q + r * a.stride + d), key, acc[r]);
    }
    EACH_OF for (int r = 0; r < RB; r++) scores[r * padded + i] = sum(acc[r]) * a.scale;
  }
}

// Turns a row of scores into weights in place; the places from n to `padded` get weight 0. A sink counts in the sum only.
void list_weights(float* s, int64_t n, int64_t padded, const float* sink) {
  for (int64_t i = n; i < padded; i++) s[i] = -INFINITY;
  F peak = set(-INFINITY), sums = set(0);
  for (int64_t i = 0; i < padded; i += F::N) peak = max(peak, load(s + i));
  const float top = sink ? std::max(largest(peak), *sink) : largest(peak);
  for (int64_t i = 0; i < padded; i += F::N) {
    const F p = exp(load(s + i) - set(top));
    store(s + i, p);
    sums = sums + p;
  }
  const float total = sum(sums) + (sink ? std::exp(*sink - top) : 0.0f);
  for (int64_t i = 0; i < n; i++) s[i] /= total;
}

template <Fmt C, int RB>
void list_values(const ListArgs& a, const void* const* keys, int64_t n, const float* weights, int64_t padded, float* out) {
  constexpr int NV = 16 / F::N;
  for (int d = 0; d < a.stride; d += NV * F::N) {
    F acc[RB][NV];
    EACH_OF for (int r = 0; r < RB; r++)
      EACH_OF for (int j = 0; j < NV; j++) acc[r][j] = set(0);
    for (int64_t i = 0; i < n; i++) {
      F value[NV];
      EACH_OF for (int j = 0; j < NV; j++) value[j] = load_cache<C>(keys[i], d + j * F::N);
      EACH_OF for (int r = 0; r < RB; r++)
        EACH_OF for (int j = 0; j < NV; j++) acc[r][j] = fma(set(weights[r * padded + i]), value[j], acc[r][j]);
    }
    EACH_OF for (int r = 0; r < RB; r++)
      EACH_OF for (int j = 0; j < NV; j++) store(out + r * a.stride + d + j * F::N, acc[r][j]);
  }
}

template <Fmt C>
void attend_list_of(const ListArgs& a, const void* const* keys, int64_t n, float* scores) {
  const int64_t padded = (n + 15) / 16 * 16;
  for (int r = 0; r < a.rows; r += kListRows)
    with_rows<kListRows>(std::min(kListRows, a.rows - r), [&]<int RB>() {
      list_scores<C, RB>(a, keys, n, a.q + r * a.stride, scores + r * padded, padded);
    });
  for (int r = 0; r < a.rows; r++) list_weights(scores + r * padded, n, padded, a.sinks ? a.sinks + r : nullptr);
  for (int r = 0; r < a.rows; r += kListRows)
    with_rows<kListRows>(std::min(kListRows, a.rows - r), [&]<int RB>() {
      list_values<C, RB>(a, keys, n, scores + r * padded, padded, a.out + r * a.stride);
    });
}

void attend_list(const ListArgs& a, const void* const* keys, int64_t n, float* scores) {
  if (a.format == Fmt::BF16) attend_list_of<Fmt::BF16>(a, keys, n, scores);
  else attend_list_of<Fmt::F32>(a, keys, n, scores);
}

template <Fmt C>
void pool_rows_of(const PooledRow* rows, int64_t n, int width, float* out) {
  for (int d = 0; d < width; d += F::N) {
    auto gate = [&](int64_t i) { return load_cache<C>(rows[i].gate, d) + load(rows[i].bias + d); };
    F top = gate(0), total = set(0), sum = set(0);
    for (int64_t i = 1; i < n; i++) top = max(top, gate(i));
    for (int64_t i = 0; i < n; i++) {
      const F p = exp(gate(i) - top);
      total = total + p;
      sum = fma(p, load_cache<C>(rows[i].value, d), sum);
    }
    store(out + d, sum / total);
  }
}

void pool_rows(const PooledRow* rows, int64_t n, int width, Fmt format, float* out) {
  if (format == Fmt::BF16) pool_rows_of<Fmt::BF16>(rows, n, width, out);
  else pool_rows_of<Fmt::F32>(rows, n, width, out);
}
