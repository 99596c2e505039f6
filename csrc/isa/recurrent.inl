// Kernels of ops with recurrent state. Each value of a state is one chain of operations over the tokens of its sequence, and
// each element of a result is one chain over the columns of its head, in ascending order. So bits depend neither on how a
// prompt was cut nor on the batch. State lies in blocks of kColumns columns; see kernels.h.

constexpr int kStateVectors = kColumns / F::N;
constexpr int64_t kTokensAhead = 3;  // tokens by which rows are prefetched

// out = bias + the sum over taps j of w[j] * x[j], where w is [taps][n] and x[j] is null before the start of a sequence.
void conv_row(const ConvArgs& a, const float* const* x, float* out) {
  for (int64_t c = 0; c < a.width; c += F::N) {
    const int64_t n = a.width - c;
    F y = a.bias ? load_first(a.bias + c, n) : set(0);
    for (int64_t j = 0; j < a.taps; j++)
      if (x[j]) y = fma(load_first(a.w + j * a.width + c, n), load_first(x[j] + c, n), y);
    store_first(out + c, y, n);
  }
}

void decay_row(const DecayArgs& a, const float* x, float* step, float* decay) {
  for (int64_t c = 0; c < a.width; c += F::N) {
    const int64_t n = a.width - c;
    F y = load_first(x + c, n);
    if (a.bias) y = y + load_first(a.bias + c, n);
    y = max(set(a.low), softplus(y));
    if (a.high > 0) y = min(set(a.high), y);
    store_first(step + c, y, n);
    store_first(decay + c, load_first(a.rates + c, n) * y, n);
  }
}

// One token of one head: its rows of q and k [keys], and the factor of each row of the state (step 1) or of all (step 0).
struct HeadToken {
  const float *q, *k, *kept;
  int64_t step;
};

// to = kept from, u = to^T k, for a block of state [keys][kColumns].
void decay_block(const HeadToken& t, const float* from, float* to, int64_t keys, F* u) {
  EACH_OF for (int v = 0; v < kStateVectors; v++) u[v] = set(0);
  for (int64_t i = 0; i < keys; i++, from += kColumns, to += kColumns) {
    const F kept = set(t.kept[i * t.step]), key = set(t.k[i]);
    EACH_OF for (int v = 0; v < kStateVectors; v++) {
      const F s = load(from + v * F::N) * kept;
      u[v] = fma(s, key, u[v]);
      store(to + v * F::N, s);
    }
  }
}

// to = from + k u^T, out = to^T q. With `More` also what decay_block() does for the next token: to = kept to, after = to^T k.
template <bool More>
void update_block(const HeadToken& t, const HeadToken& next, const float* from, float* to, int64_t keys, const F* u, F* out, F* after) {
  EACH_OF for (int v = 0; v < kStateVectors; v++) out[v] = after[v] = set(0);
  for (int64_t i = 0; i < keys; i++, from += kColumns, to += kColumns) {
    const F key = set(t.k[i]), query = set(t.q[i]);
    EACH_OF for (int v = 0; v < kStateVectors; v++) {
      F s = fma(key, u[v], load(from + v * F::N));
      out[v] = fma(s, query, out[v]);
      if constexpr (More) {
        s = s * set(next.kept[i * next.step]);
        after[v] = fma(s, set(next.k[i]), after[v]);
      }
      store(to + v * F::N, s);
    }
  }
}

// to = kept from + k u^T, out = to^T q.
void advance_block(const HeadToken& t, const float* from, float* to, int64_t keys, const F* u, F* out) {
  EACH_OF for (int v = 0; v < kStateVectors; v++) out[v] = set(0);
  for (int64_t i = 0; i < keys; i++, from += kColumns, to += kColumns) {
    const F kept = set(t.kept[i * t.step]), key = set(t.k[i]), query = set(t.q[i]);
    EACH_OF for (int v = 0; v < kStateVectors; v++) {
      const F s = fma(key, u[v], load(from + v * F::N) * kept);
      out[v] = fma(s, query, out[v]);
      store(to + v * F::N, s);
    }
  }
}

// Vector j of `width` columns; zeros beyond them.
inline F load_column(const float* p, int64_t j, int64_t width) {
  return j * F::N < width ? load_first(p + j * F::N, width - j * F::N) : set(0);
}

// Prefetches n floats, to be read or written: rows of a wide matrix are too far apart for hardware prefetching.
template <int write = 0>
void fetch(const float* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(p + i, write, 3);
}

// The tokens of one sequence for one head. scratch: the factors of two tokens, then a block of state.
void attend_state(const StateAttentionArgs& a, const StateRun& run, int64_t head, float* scratch) {
  const int64_t group = head / a.share * a.keys, end = run.first + run.count;
  const float skip = a.skip ? a.skip[head] : 0.0f;
  auto token = [&](int64_t t) {
    float* kept = scratch + (t & 1) * (a.keys + kMostLanes);
    if (a.by_key)
      for (int64_t i = 0; i < a.keys; i += F::N)
        store(kept + i, exp(load_first(a.decay + t * a.ld_decay + head * a.keys + i, a.keys - i)));
    else store(kept, exp(set(a.decay ? a.decay[t * a.ld_decay + head] : a.rates[head])));
    return HeadToken{a.q + t * a.ld_q + group, a.k + t * a.ld_k + group, kept, a.by_key};
  };
  for (int64_t first = 0; first < a.values; first += kColumns) {
    const int64_t width = std::min<int64_t>(kColumns, a.values - first), at = head * a.keys * a.values + first * a.keys;
    const bool whole = width == kColumns;
    const float* from = run.from ? run.from + at : nullptr;
    float *padded = scratch + 2 * (a.keys + kMostLanes), *to = whole ? run.to + at : padded;
    if (!from || !whole) {
      for (int64_t i = 0; i < a.keys; i++) {
        float* row = to + i * kColumns;
        if (from) std::memcpy(row, from + i * width, size_t(width) * 4);
        std::fill(from ? row + width : row, row + kColumns, 0.0f);
      }
      from = to;
    }
    F u[kStateVectors], out[kStateVectors], after[kStateVectors];
    HeadToken now = token(run.first);
    if (a.delta) decay_block(now, from, to, a.keys, after), from = to;
    for (int64_t t = run.first; t < end; t++) {
      const F beta = set(a.beta ? a.beta[t * a.ld_beta + head] : 1.0f);
      const float* v = a.v + t * a.ld_v + head * a.values + first;
      EACH_OF for (int j = 0; j < kStateVectors; j++) {
        const F value = load_column(v, j, width);
        u[j] = (a.delta ? value - after[j] : value) * beta;
      }
      if (const int64_t soon = t + kTokensAhead; soon < end) {
        fetch(a.q + soon * a.ld_q + group, a.keys), fetch(a.k + soon * a.ld_k + group, a.keys);
        fetch(a.v + soon * a.ld_v + head * a.values + first, width);
        fetch<1>(a.out + soon * a.ld_out + head * a.values + first, width);
        if (a.by_key) fetch(a.decay + soon * a.ld_decay + head * a.keys, a.keys);
      }
      const HeadToken next = t + 1 < end ? token(t + 1) : now;
      if (!a.delta) advance_block(now, from, to, a.keys, u, out);
      else if (t + 1 < end) update_block<true>(now, next, from, to, a.keys, u, out, after);
      else update_block<false>(now, next, from, to, a.keys, u, out, after);
      EACH_OF for (int j = 0; j < kStateVectors; j++) {
        F y = out[j] * set(a.scale);
        if (a.skip) y = fma(load_column(v, j, width), set(skip), y);
        if (j * F::N < width) store_first(a.out + t * a.ld_out + head * a.values + first + j * F::N, y, width - j * F::N);
      }
      now = next, from = to;
    }
    if (!whole)
      for (int64_t i = 0; i < a.keys; i++) std::memcpy(run.to + at + i * width, to + i * kColumns, size_t(width) * 4);
  }
}

// The tokens of one sequence for the kColumns channels from `first`.
void scan_channels(const ScanArgs& a, const StateRun& run, int64_t first) {
  const int64_t width = std::min<int64_t>(kColumns, a.channels - first), at = first * a.n;
  const float *rates = a.rates + at, *from = run.from ? run.from + at : nullptr;
  float* to = run.to + at;
  for (int64_t t = run.first; t < run.first + run.count; t++, from = to)
    for (int64_t c = 0; c < width; c += F::N) {
      const int64_t some = width - c;
      const float *b = a.b + t * a.ld_b, *read = a.c + t * a.ld_c;
      const F x = load_first(a.x + t * a.ld_x + first + c, some), step = softplus(load_first(a.step + t * a.ld_step + first + c, some));
      const F input = step * x;
      F y = load_first(a.skip + first + c, some) * x;
      for (int64_t i = 0, j = c; i < a.n; i++, j += width) {
        F h = input * set(b[i]);
        if (from) h = fma(exp(load_first(rates + j, some) * step), load_first(from + j, some), h);
        store_first(to + j, h, some);
        y = fma(h, set(read[i]), y);
      }
      store_first(a.out + t * a.ld_out + first + c, y, some);
    }
}

// The tokens of one sequence for the kColumns channels from `first`.
void lru_channels(const LruArgs& a, const StateRun& run, int64_t first) {
  const int64_t last = std::min(a.channels, first + kColumns);
  const float* from = run.from;
  for (int64_t t = run.first; t < run.first + run.count; t++, from = run.to)
    for (int64_t c = first; c < last; c += F::N) {
      const int64_t some = last - c;
      auto gate = [&](const float* x, const float* bias) { return sigmoid(load_first(x + c, some) + load_first(bias + c, some)); };
      const F log = load_first(a.rates + c, some) * gate(a.decay_gate + t * a.ld_decay, a.decay_bias);
      F h = load_first(a.x + t * a.ld_x + c, some) * gate(a.input_gate + t * a.ld_input, a.input_bias);
      if (a.positions[t]) h = h * sqrt(set(0) - expm1(log + log));
      if (from) h = fma(exp(log), load_first(from + c, some), h);
      store_first(run.to + c, h, some);
      store_first(a.out + t * a.ld_out + c, h, some);
    }
}
