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

// Evaluates the postfix expression of `map` for one vector of values.
F map_vector(const MapArgs& a, const float* const* x) {
  F stack[kMapStack];
  int top = 0;
  for (int64_t s = 0; s < a.count; s++) {
    const auto [what, arg] = a.steps[s];
    switch (what) {
      case MapStep::Operand: stack[top++] = a.column[arg] ? set(x[arg][0]) : load(x[arg]); break;
      case MapStep::Number: stack[top++] = set(a.numbers[arg]); break;
      case MapStep::Call: stack[top - 1] = activate(Act(arg), stack[top - 1]); break;
      case MapStep::Add: top--; stack[top - 1] = stack[top - 1] + stack[top]; break;
      case MapStep::Subtract: top--; stack[top - 1] = stack[top - 1] - stack[top]; break;
      case MapStep::Multiply: top--; stack[top - 1] = stack[top - 1] * stack[top]; break;
      case MapStep::Divide: top--; stack[top - 1] = stack[top - 1] / stack[top]; break;
    }
  }
  return stack[0];
}

void map_row(const MapArgs& a, int64_t row, float* scratch) {
  const float* x[3] = {};
  int64_t i = 0;
  for (; i + F::N <= a.cols; i += F::N) {
    for (int o = 0; o < 3; o++)
      if (a.operand[o]) x[o] = a.operand[o] + row * a.ld[o] + (a.column[o] ? 0 : i);
    store(a.out + row * a.ld_out + i, map_vector(a, x));
  }
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
    store(last, map_vector(a, x));
    std::memcpy(a.out + row * a.ld_out + i, last, bytes);
  }
}

float largest_logit(const float* x, int64_t n) {
  F peaks = set(-INFINITY), poison = set(0);
  int64_t i = 0;
  for (; i + F::N <= n; i += F::N) {
    F v = load(x + i);
    peaks = max(v, peaks);
    poison = poison + v * set(0);  // NaN if v is NaN or infinite; a row with +inf has no finite maximum anyway
  }
  float top = largest(peaks), bad = sum(poison);
  for (; i < n; i++) {
    top = x[i] > top ? x[i] : top;
    bad += x[i] * 0.0f;
  }
  if (bad == 0) return top;
  for (i = 0; i < n; i++)  // -inf is a masked token, not an error
    if (std::isnan(x[i])) return x[i];
  return top;
}

// p[i] = exp((x[i] - top) / temperature); returns their sum, accumulated in double over runs of 256.
double weigh(const float* x, int64_t n, float top, float temperature, float* p) {
  double total = 0;
  for (int64_t i = 0; i < n; i += 256) {
    F run = set(0);
    int64_t end = std::min(n, i + 256), j = i;
    for (; j + F::N <= end; j += F::N) {
      F e = exp((load(x + j) - set(top)) / set(temperature));
      store(p + j, e);
      run = run + e;
    }
    total += sum(run);
    for (; j < end; j++) {
      float e[F::N];
      store(e, exp((set(x[j]) - set(top)) / set(temperature)));
      p[j] = e[0];
      total += e[0];
    }
  }
  return total;
}

