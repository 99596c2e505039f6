// Ops of hyper-connections: sinkhorn makes matrices doubly stochastic, mix_streams mixes residual streams.
#include <algorithm>
#include <cmath>

#include "run/op.h"

namespace intaglio {
namespace {

class Sinkhorn : public OpKernel {
 public:
  explicit Sinkhorn(OpArgs& a)
      : x_(a.rows("x")), out_(a.rows("out")), iterations_(a.integer("iterations")), n_(int64_t(std::lround(std::sqrt(double(x_.cols))))),
        eps_(a.number("eps")) {}
  void plan(Planner& p) override { p.rows(out_.rows(), out_.cols * iterations_); }
  void run(int, int64_t begin, int64_t end, Scratch&) override {
    for (int64_t r = begin; r < end; r++) {
      float* m = out_.row(r);
      for (int64_t i = 0; i < n_; i++) softmax(x_.row(r) + i * n_, m + i * n_);
      for (int64_t i = 0; i < iterations_; i++) {
        if (i) normalise(m, n_, 1);
        normalise(m, 1, n_);
      }
    }
  }

 private:
  void softmax(const float* x, float* out) const {
    const float top = *std::max_element(x, x + n_);
    float total = 0;
    for (int64_t j = 0; j < n_; j++) total += out[j] = std::exp(x[j] - top);
    for (int64_t j = 0; j < n_; j++) out[j] = out[j] / total + eps_;
  }
  // Divides each line of m by its sum. A line's values are `step` apart, lines are `next` apart.
  void normalise(float* m, int64_t next, int64_t step) const {
    for (int64_t i = 0; i < n_; i++) {
      float total = eps_;
      for (int64_t j = 0; j < n_; j++) total += m[i * next + j * step];
      for (int64_t j = 0; j < n_; j++) m[i * next + j * step] /= total;
    }
  }

  const Tensor &x_, &out_;
  int64_t iterations_, n_;
  float eps_;
};

class MixStreams : public OpKernel {
 public:
  explicit MixStreams(OpArgs& a)
      : x_(a.rows("x")), weights_(a.rows("weights")), out_(a.rows("out")), branch_(a.optional_rows("branch")),
        gains_(a.optional_rows("gains")), n_(a.integer("streams")), m_(weights_.cols / n_), width_(x_.cols / n_) {}
  void plan(Planner& p) override { p.rows(out_.rows(), x_.cols + out_.cols); }
  void run(int, int64_t begin, int64_t end, Scratch&) override {
    for (int64_t r = begin; r < end; r++)
      for (int64_t k = 0; k < m_; k++) mix(r, k);
  }

 private:
  void mix(int64_t r, int64_t k) const {
    float* out = out_.row(r) + k * width_;
    const float *x = x_.row(r), *w = weights_.row(r) + k;
    const float gain = gains_ ? gains_->row(r)[k] : 0.0f;
    const float* branch = branch_ ? branch_->row(r) : nullptr;
    for (int64_t d = 0; d < width_; d++) out[d] = branch ? gain * branch[d] : 0.0f;
    for (int64_t j = 0; j < n_; j++)
      for (int64_t d = 0; d < width_; d++) out[d] += w[j * m_] * x[j * width_ + d];
  }

  const Tensor &x_, &weights_, &out_, *branch_, *gains_;
  int64_t n_, m_, width_;
};

const Registered<Sinkhorn> sinkhorn("sinkhorn");
const Registered<MixStreams> mix_streams("mix_streams");

}  // namespace
}  // namespace intaglio
