// Kernels that process one row: norms, elementwise expressions, and the maximum and exponentials of sampling.

// Sum of f(x) over n floats: in vector lanes, then the tail as one more term. The order depends only on n.
template <class Fn>
float sum_over(const float* x, int64_t n, Fn f) {
  F lanes[4] = {set(0), set(0), set(0), set(0)};
  int64_t i = 0;
  for (; i + 4 * F::N <= n; i += 4 * F::N)
    for (int j = 0; j < 4; j++) lanes[j] = lanes[j] + f(load(x + i + j * F::N));
  for (; i + F::N <= n; i += F::N) lanes[0] = lanes[0] + f(load(x + i));
  float tail[F::N] = {}, total = sum((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]));
  if (i < n) {
    std::memcpy(tail, x + i, size_t(n - i) * 4);
    float t[F::N];
    store(t, f(load(tail)));
    for (int64_t j = 0; j < n - i; j++) total += t[j];
  }
  return total;
}

void norm_group(const NormArgs& a, const float* x, const float* w, const float* b, const float* r, float* out, int64_t n) {
  const bool plain = a.kind == NormKind::None;
  float mean = a.kind == NormKind::Layer ? sum_over(x, n, [](F v) { return v; }) / float(n) : 0.0f;
  float squares = plain ? 0.0f : sum_over(x, n, [&](F v) { return (v - set(mean)) * (v - set(mean)); });
  float inverse = plain ? 1.0f : 1.0f / std::sqrt((a.kind == NormKind::L2 ? squares : squares / float(n)) + a.eps);
  for (int64_t i = 0; i < n; i++) {
    float y = (x[i] - mean) * inverse;
    if (w) y *= w[i] + a.offset;
    if (b) y += b[i];
    out[i] = r ? y + r[i] : y;
  }
}

void norm_row(const NormArgs& a, int64_t row) {
  for (int64_t i = 0; i < a.width; i += a.group)
    norm_group(a, a.x + row * a.ld_x + i, a.weight, a.bias, a.residual ? a.residual + row * a.ld_residual + i : nullptr,
               a.out + row * a.ld_out + i, a.group);
}

float moment(const float* x, int64_t n, MomentOf of) {
  const float mean = of == MomentOf::Rms ? 0.0f : sum_over(x, n, [](F v) { return v; }) / float(n);
  if (of == MomentOf::Mean) return mean;
  return std::sqrt(sum_over(x, n, [&](F v) { return (v - set(mean)) * (v - set(mean)); }) / float(n));
}

// Evaluates the postfix expression of `map` for V vectors of values, one step of the expression at a time: with more vectors,
// fewer steps have to be decoded.
template <int V>
void map_vectors(const MapArgs& a, const float* const* x, float* out) {
  F stack[kMapStack][V];
  int top = 0;
  auto combine = [&](auto f) {
    top--;
    for (int v = 0; v < V; v++) stack[top - 1][v] = f(stack[top - 1][v], stack[top][v]);
  };
  for (int64_t s = 0; s < a.count; s++) {
    const auto [what, arg] = a.steps[s];
    switch (what) {
      case MapStep::Operand:
        for (int v = 0; v < V; v++) stack[top][v] = a.column[arg] ? set(x[arg][0]) : load(x[arg] + v * F::N);
        top++;
        break;
      case MapStep::Number:
        for (int v = 0; v < V; v++) stack[top][v] = set(a.numbers[arg]);
        top++;
        break;
      case MapStep::Call:
        for (int v = 0; v < V; v++) stack[top - 1][v] = activate(Act(arg), stack[top - 1][v]);
        break;
      case MapStep::Add: combine([](F p, F q) { return p + q; }); break;
      case MapStep::Subtract: combine([](F p, F q) { return p - q; }); break;
      case MapStep::Multiply: combine([](F p, F q) { return p * q; }); break;
      case MapStep::Divide: combine([](F p, F q) { return p / q; }); break;
    }
  }
  for (int v = 0; v < V; v++) store(out + v * F::N, stack[0][v]);
}

void map_row(const MapArgs& a, int64_t row, float* scratch) {
  const float* x[3] = {};
  int64_t i = 0;
  auto many = [&]<int V>() {
    for (; i + V * F::N <= a.cols; i += V * F::N) {
      for (int o = 0; o < 3; o++)
        if (a.operand[o]) x[o] = a.operand[o] + row * a.ld[o] + (a.column[o] ? 0 : i);
      map_vectors<V>(a, x, a.out + row * a.ld_out + i);
    }
  };
  many.template operator()<8>(), many.template operator()<1>();
  if (i < a.cols) {
    size_t bytes = size_t(a.cols - i) * 4;
    for (int o = 0; o < 3; o++)
      if (a.operand[o] && a.column[o]) {
        x[o] = a.operand[o] + row * a.ld[o];
      } else if (a.operand[o]) {
        std::memset(scratch + o * F::N, 0, F::N * 4);
        std::memcpy(scratch + o * F::N, a.operand[o] + row * a.ld[o] + i, bytes);
        x[o] = scratch + o * F::N;
      }
    float last[F::N];
    map_vectors<1>(a, x, last);
    std::memcpy(a.out + row * a.ld_out + i, last, bytes);
  }
}

float largest_logit(const float* x, int64_t n, int64_t* first) {
  constexpr int64_t kRun = 1024;  // logits whose maximum is taken before it is compared: only one run is searched for it
  F poison = set(0);  // NaN if a value is NaN or infinite; a row with +inf has no finite maximum anyway
  float top = -INFINITY, bad = 0;
  int64_t run = 0;
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t end = std::min(n, begin + kRun);
    F peaks = set(-INFINITY);
    int64_t i = begin;
    for (; i + F::N <= end; i += F::N) {
      F v = load(x + i);
      peaks = max(v, peaks);
      poison = poison + v * set(0);
    }
    float high = largest(peaks);
    for (; i < end; i++) {
      high = x[i] > high ? x[i] : high;
      bad += x[i] * 0.0f;
    }
    if (high > top) top = high, run = begin;
  }
  if (bad + sum(poison) != 0)  // -inf is a masked token, not an error
    for (int64_t i = 0; i < n; i++)
      if (std::isnan(x[i])) return x[i];
  if (first) *first = std::find(x + run, x + std::min(n, run + kRun), top) - x;
  return top;
}

// p[i] = exp((x[i] - top) / temperature), unless p is null; returns their sum, accumulated in double over runs of 256.
double weigh(const float* x, int64_t n, float top, float temperature, float* p) {
  double total = 0;
  const bool scaled = temperature != 1;
  auto term = [&](F v) { return exp(scaled ? (v - set(top)) / set(temperature) : v - set(top)); };
  for (int64_t i = 0; i < n; i += 256) {
    F run = set(0);
    int64_t end = std::min(n, i + 256), j = i;
    for (; j + F::N <= end; j += F::N) {
      F e = term(load(x + j));
      if (p) store(p + j, e);
      run = run + e;
    }
    total += sum(run);
    for (; j < end; j++) {
      float e[F::N];
      store(e, term(set(x[j])));
      if (p) p[j] = e[0];
      total += e[0];
    }
  }
  return total;
}
