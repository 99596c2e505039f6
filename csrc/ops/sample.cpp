// Op sample: samples a token from each row of logits, as draw() in ops/sample.py. This file is not compiled for each
// instruction set: the linker could otherwise use an AVX version of a standard library template everywhere.
#include <algorithm>
#include <cmath>
#include <vector>

#include "run/op.h"

namespace intaglio {

namespace {

double uniform(uint64_t seed, int64_t position) {  // splitmix64 over (seed, position), in [0, 1)
  uint64_t z = seed * 0x9E3779B97F4A7C15ull + uint64_t(position + 1) * 0xD1B54A32D192ED03ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return double((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

// Sets p to 0 outside the top-k and top-p tokens. Only tokens that could be among them are sorted.
void filter(const float* x, int64_t n, const RowSampling& d, double total, std::vector<float>& p) {
  int64_t k = d.top_k > 0 ? std::min<int64_t>(d.top_k, n) : n;
  // Tokens with less weight than this sum to less than 1 - top_p of the total, so top-p excludes them all (without top-k).
  float least = k == n ? float((1.0 - double(d.top_p)) * total / double(n)) * 0.5f : -1.0f;
  std::vector<int32_t> order;
  for (int64_t i = 0; i < n; i++)
    if (p[i] >= least) order.push_back(int32_t(i));
  auto before = [&](int32_t a, int32_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); };
  if (k < int64_t(order.size())) {
    std::nth_element(order.begin(), order.begin() + k, order.end(), before);
    order.resize(k);
    total = 0;
  }
  std::sort(order.begin(), order.end(), before);
  if (total == 0)
    for (int32_t i : order) total += p[i];
  if (d.top_p < 1) {
    double mass = 0;
    size_t kept = 0;
    while (kept < order.size() && mass < double(d.top_p) * total) mass += p[order[kept++]];
    order.resize(std::max<size_t>(1, kept));
  }
  std::vector<float> only(size_t(n), 0.0f);
  for (int32_t i : order) only[i] = p[i];
  p.swap(only);
}

// The logits to sample from: x itself, or a copy with logit edits and grammar mask applied.
const float* edited(const float* x, int64_t n, const RowSampling& d) {
  if (d.edits == 0 && !d.mask) return x;
  thread_local std::vector<float> y;
  y.assign(x, x + n);
  for (int64_t i = 0; i < d.edits; i++) {
    float& l = y[size_t(d.ids[i])];
    l = (l > 0 ? l / d.scale[i] : l * d.scale[i]) + d.add[i];
  }
  if (d.mask)
    for (int64_t i = 0; i < n; i++)
      if (!(d.mask[i / 32] >> (i % 32) & 1)) y[size_t(i)] = -INFINITY;
  return y.data();
}

// Samples a token and computes its log-probability; -1 and NaN if a logit is NaN, or if the largest one, before or after
// edits, is not finite.
void sample_row(const Kernels& kernels, const float* x, int64_t n, const RowSampling& d, int32_t* token, float* logprob) {
  int64_t chosen = 0;
  float top = kernels.largest_logit(x, n, &chosen);
  *token = -1, *logprob = NAN;
  if (!std::isfinite(top)) return;
  const float* y = edited(x, n, d);
  float best = y == x ? top : kernels.largest_logit(y, n, &chosen);
  if (!std::isfinite(best)) return;
  double total = kernels.weigh(x, n, top, 1.0f, nullptr);
  if (d.temperature > 0) {
    thread_local std::vector<float> p;
    p.resize(size_t(n));
    double mass = kernels.weigh(y, n, best, d.temperature, p.data());
    if (d.top_k > 0 || d.top_p < 1) filter(y, n, d, mass, p);
    mass = 0;
    for (float& v : p) {
      if (v < d.min_p) v = 0;
      mass += double(v);
    }
    double target = uniform(d.seed, d.position) * mass, seen = 0;
    for (int64_t i = 0; i < n; i++) {
      seen += double(p[size_t(i)]);
      if (seen > target) {
        chosen = i;
        break;
      }
    }
  }
  *token = int32_t(chosen);
  *logprob = float(double(x[chosen]) - double(top) - std::log(total));
}

class Sample : public OpKernel {
 public:
  explicit Sample(OpArgs& a)
      : context_(a.context), logits_(a.rows("logits")), tokens_(a.rows("tokens")), logprobs_(a.rows("logprobs")) {}
  void plan(Planner& p) override { p.rows(logits_.rows(), logits_.cols, 1); }
  void run(int, int64_t begin, int64_t end, Scratch&) override {
    for (int64_t r = begin; r < end; r++)
      sample_row(context_.kernels, logits_.row(r), logits_.cols, context_.in.draws[r], tokens_.integers(r), logprobs_.row(r));
  }

 private:
  const Context& context_;
  const Tensor &logits_, &tokens_, &logprobs_;
};

const Registered<Sample> sample("sample");

}  // namespace
}  // namespace intaglio
