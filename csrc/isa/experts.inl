// Router: choosing a token's experts and their weights; and combining the experts' results.

// ids = indices of the `count` largest of key[0 .. n), largest first, ties to the lowest index. Sets those keys to -inf.
void take_best(float* key, int64_t n, int64_t count, int32_t* ids) {
  for (int64_t j = 0; j < count; j++) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
      if (key[i] > key[best]) best = i;
    ids[j] = int32_t(best);
    key[best] = -INFINITY;
  }
}

void softmax_of(const float* x, int64_t n, float top, float* p) {
  const float total = float(weigh(x, n, top, 1.0f, p));
  for (int64_t i = 0; i < n; i++) p[i] /= total;
}

// Group-limited routing: sets the keys of a group to -inf unless it is among the a.kept groups with the largest sum of
// their a.group_best highest keys.
void close_groups(const RouteArgs& a, float* key, float* scratch) {
  const int64_t each = a.experts / a.groups;
  float *worth = scratch, *run = scratch + a.groups;
  int32_t ids[kMaxGroups];
  for (int64_t g = 0; g < a.groups; g++) {
    std::memcpy(run, key + g * each, size_t(each) * 4);
    worth[g] = 0;
    for (int64_t j = 0; j < a.group_best; j++) {
      take_best(run, each, 1, ids);
      worth[g] += key[g * each + ids[0]];
    }
  }
  take_best(worth, a.groups, a.kept, ids);
  for (int64_t j = 0; j < a.kept; j++) worth[ids[j]] = INFINITY;
  for (int64_t g = 0; g < a.groups; g++)
    if (worth[g] != INFINITY) std::fill(key + g * each, key + (g + 1) * each, -INFINITY);
}

// SparseMixer at inference, as sparsemixer() in ops/experts.py.
void mix_sparsely(const RouteArgs& a, const float* logits, float* weights, int32_t* ids, float* left) {
  std::memcpy(left, logits, size_t(a.experts) * 4);
  for (int64_t j = 0; j < a.top; j++) {
    int64_t best = 0;
    for (int64_t i = 1; i < a.experts; i++)
      if (left[i] > left[best]) best = i;
    const float top = left[best];
    double total = 0;
    for (int64_t i = 0; i < a.experts; i++) {
      const float size = std::max(std::fabs(logits[i]), top);
      if (!((top - logits[i]) / size > 2 * a.jitter)) total += std::exp(double(left[i]) - top);
    }
    ids[j] = int32_t(best);
    weights[j] = float(1 / total);
    left[best] = -INFINITY;
  }
}

// The score of each expert, from which the weights of the chosen ones are taken.
void score(const RouteArgs& a, const float* logits, float* scores) {
  const int64_t n = a.experts;
  if (a.score == RouteScore::Softmax) return softmax_of(logits, n, largest_logit(logits, n, nullptr), scores);
  for (int64_t i = 0; i < n; i++)
    scores[i] = a.score == RouteScore::Sigmoid ? float(1 / (1 + std::exp(-double(logits[i]))))
                                              : float(std::sqrt(logits[i] > 30 ? double(logits[i]) : std::log1p(std::exp(double(logits[i])))));
}

// Routes one token. scratch: 3 * experts + groups floats.
void route_row(const RouteArgs& a, int64_t row, float* scratch) {
  const float* logits = a.logits + row * a.ld_logits;
  float *scores = scratch, *key = scratch + a.experts, *weights = a.weights + row * a.ld_weights;
  int32_t* ids = a.ids + row * a.ld_ids;
  if (a.score == RouteScore::Sparsemixer) {
    mix_sparsely(a, logits, weights, ids, key);
  } else {
    const bool chosen = a.score == RouteScore::Chosen;
    if (!chosen) score(a, logits, scores);
    const bool by_score = a.bias || a.group_best > 1;
    for (int64_t i = 0; i < a.experts; i++) key[i] = by_score ? scores[i] + (a.bias ? a.bias[i] : 0.0f) : logits[i];
    if (a.groups) close_groups(a, key, key + a.experts);
    if (a.table)
      for (int64_t j = 0; j < a.top; j++) ids[j] = int32_t(a.table[a.tokens[row] * a.top + j]);
    else
      take_best(key, a.experts, a.top, ids);
    for (int64_t j = 0; j < a.top; j++) weights[j] = (chosen ? logits : scores)[ids[j]];
    if (chosen) {
      for (int64_t j = 0; j < a.top; j++) scores[j] = weights[j];
      softmax_of(scores, a.top, scores[0], weights);
    }
  }
  float total = 1e-20f;
  for (int64_t j = 0; j < a.top; j++) total += weights[j];
  for (int64_t j = 0; j < a.top; j++) weights[j] = (a.normalise ? weights[j] / total : weights[j]) * a.scale;
}

// out = residual + sum over j, ascending, of weights[j] * rows[j].
void combine_row(const float* const* rows, const float* weights, int64_t count, const float* residual, float* out, int64_t n) {
  auto at = [&](int64_t i) {
    F sum = load(rows[0] + i) * set(weights[0]);
    for (int64_t j = 1; j < count; j++) sum = fma(load(rows[j] + i), set(weights[j]), sum);
    return sum;
  };
  int64_t i = 0;
  for (; i + F::N <= n; i += F::N) store(out + i, residual ? at(i) + load(residual + i) : at(i));
  for (; i < n; i++) {
    float sum = rows[0][i] * weights[0];
    for (int64_t j = 1; j < count; j++) sum = std::fma(rows[j][i], weights[j], sum);
    out[i] = residual ? sum + residual[i] : sum;
  }
}
