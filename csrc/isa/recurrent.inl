// Kernels of the ops with recurrent state: convolution, decay, linear attention, scan, RG-LRU. Each state value is one chain of
// operations over its sequence's tokens, each result one chain over the columns of its head, in ascending order. So bits depend
// neither on how a prompt was cut nor on the batch. State lies in blocks of kColumns columns; see kernels.h.

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
    const F rates = load_first(a.rates + c, n);
    if (a.floor < 0) store_first(decay + c, set(a.floor) * sigmoid(set(0) - rates * y), n);
    y = max(set(a.low), softplus(y));
    if (a.high > 0) y = min(set(a.high), y);
    store_first(step + c, y, n);
    if (a.floor >= 0) store_first(decay + c, rates * y, n);
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

// For each of `Tokens` tokens in turn: to = kept to + k u^T, out = to^T q, where `to` is `from` before the first. A block of `Vectors`
// vectors of columns of a state [keys][kColumns]; u and out are [Tokens][Vectors]. Its values stay in registers from token to token.
template <int Tokens, int Vectors>
void advance_block(const HeadToken* t, const float* from, float* to, int64_t keys, const F* u, F* out) {
  F sum[Tokens * Vectors], value[Tokens * Vectors];  // values in registers: `u` might lie in what is stored to
  EACH_OF for (int j = 0; j < Tokens * Vectors; j++) sum[j] = set(0), value[j] = u[j];
  for (int64_t i = 0; i < keys; i++, from += kColumns, to += kColumns) {
    F s[Vectors];
    EACH_OF for (int v = 0; v < Vectors; v++) s[v] = load(from + v * F::N);
    EACH_OF for (int n = 0; n < Tokens; n++) {
      const F kept = set(t[n].kept[i * t[n].step]), key = set(t[n].k[i]), query = set(t[n].q[i]);
      EACH_OF for (int v = 0; v < Vectors; v++) {
        s[v] = fma(key, value[n * Vectors + v], s[v] * kept);
        sum[n * Vectors + v] = fma(s[v], query, sum[n * Vectors + v]);
      }
    }
    EACH_OF for (int v = 0; v < Vectors; v++) store(to + v * F::N, s[v]);
  }
  EACH_OF for (int j = 0; j < Tokens * Vectors; j++) out[j] = sum[j];
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

// The `width` columns from `first` of a head's values, for tokens of one sequence.
struct HeadBlock {
  const StateAttentionArgs& a;
  int64_t head, first, width;
  float* scratch;  // factors of kStateTokens tokens

  HeadToken token(int64_t t) const {
    float* kept = scratch + t % kStateTokens * (a.keys + kMostLanes);
    if (a.by_key)
      for (int64_t i = 0; i < a.keys; i += F::N)
        store(kept + i, exp(load_first(a.decay + t * a.ld_decay + head * a.keys + i, a.keys - i)));
    else store(kept, exp(set(a.decay ? a.decay[t * a.ld_decay + head] : a.rates[head])));
    const int64_t group = head / a.share * a.keys;
    return {a.q + t * a.ld_q + group, a.k + t * a.ld_k + group, kept, a.by_key};
  }
  const float* values(int64_t t) const { return a.v + t * a.ld_v + head * a.values + first; }
  F beta(int64_t t) const { return set(a.beta ? a.beta[t * a.ld_beta + head] : 1.0f); }
  void fetch_rows(int64_t t) const {
    const int64_t group = head / a.share * a.keys;
    fetch(a.q + t * a.ld_q + group, a.keys), fetch(a.k + t * a.ld_k + group, a.keys), fetch(values(t), width);
    fetch<1>(a.out + t * a.ld_out + head * a.values + first, width);
    if (a.by_key) fetch(a.decay + t * a.ld_decay + head * a.keys, a.keys);
  }
  // Writes vector j of the result of token t, which is `out` before scale and skip.
  void write(int64_t t, int j, F out) const {
    F y = out * set(a.scale);
    if (a.skip) y = fma(load_column(values(t), j, width), set(a.skip[head]), y);
    if (j * F::N < width) store_first(a.out + t * a.ld_out + head * a.values + first + j * F::N, y, width - j * F::N);
  }
};

// Tokens t .. t + Tokens - 1 without the delta rule, `Vectors` vectors of columns at a time.
template <int Tokens, int Vectors>
void advance_tokens(const HeadBlock& b, int64_t t, const float* from, float* to) {
  HeadToken tokens[Tokens];
  for (int n = 0; n < Tokens; n++) tokens[n] = b.token(t + n);
  for (int first = 0; first < kStateVectors; first += Vectors) {
    F u[Tokens * Vectors], out[Tokens * Vectors];
    EACH_OF for (int n = 0; n < Tokens; n++)
      EACH_OF for (int v = 0; v < Vectors; v++) u[n * Vectors + v] = load_column(b.values(t + n), first + v, b.width) * b.beta(t + n);
    advance_block<Tokens, Vectors>(tokens, from + first * F::N, to + first * F::N, b.a.keys, u, out);
    for (int n = 0; n < Tokens; n++)
      EACH_OF for (int v = 0; v < Vectors; v++) b.write(t + n, first + v, out[n * Vectors + v]);
  }
}

// All tokens of `run` without the delta rule: kStateTokens at a time, so that the state is read and written once for these.
void advance_run(const HeadBlock& b, const StateRun& run, const float* from, float* to) {
  constexpr int kVectors = std::min(2, kStateVectors);
  const int64_t end = run.first + run.count;
  for (int64_t t = run.first; t < end; from = to) {
    for (int64_t n = 0; n < kStateTokens && t + kStateTokens + n < end; n++) b.fetch_rows(t + kStateTokens + n);
    if (end - t >= kStateTokens) advance_tokens<int(kStateTokens), kVectors>(b, t, from, to), t += kStateTokens;
    else advance_tokens<1, kStateVectors>(b, t, from, to), t++;
  }
}

// All tokens of `run` with the delta rule.
void delta_run(const HeadBlock& b, const StateRun& run, const float* from, float* to) {
  const int64_t end = run.first + run.count;
  F u[kStateVectors], out[kStateVectors], after[kStateVectors];
  HeadToken now = b.token(run.first);
  decay_block(now, from, to, b.a.keys, after);
  for (int64_t t = run.first; t < end; t++) {
    EACH_OF for (int j = 0; j < kStateVectors; j++) u[j] = (load_column(b.values(t), j, b.width) - after[j]) * b.beta(t);
    if (t + kTokensAhead < end) b.fetch_rows(t + kTokensAhead);
    const HeadToken next = t + 1 < end ? b.token(t + 1) : now;
    if (t + 1 < end) update_block<true>(now, next, to, to, b.a.keys, u, out, after);
    else update_block<false>(now, next, to, to, b.a.keys, u, out, after);
    EACH_OF for (int j = 0; j < kStateVectors; j++) b.write(t, j, out[j]);
    now = next;
  }
}

// The tokens of one sequence for one head. scratch: the factors of kStateTokens tokens, then a block of state.
void attend_state(const StateAttentionArgs& a, const StateRun& run, int64_t head, float* scratch) {
  for (int64_t first = 0; first < a.values; first += kColumns) {
    const int64_t width = std::min<int64_t>(kColumns, a.values - first), at = head * a.keys * a.values + first * a.keys;
    const bool whole = width == kColumns;
    const float* from = run.from ? run.from + at : nullptr;
    float *padded = scratch + kStateTokens * (a.keys + kMostLanes), *to = whole ? run.to + at : padded;
    if (!from || !whole) {
      for (int64_t i = 0; i < a.keys; i++) {
        float* row = to + i * kColumns;
        if (from) std::memcpy(row, from + i * width, size_t(width) * 4);
        std::fill(from ? row + width : row, row + kColumns, 0.0f);
      }
      from = to;
    }
    const HeadBlock block{a, head, first, width, scratch};
    (a.delta ? delta_run : advance_run)(block, run, from, to);
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
