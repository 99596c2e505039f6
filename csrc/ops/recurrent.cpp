// Ops with recurrent state in slots. A step reads a sequence's slot state_from and writes its slot state_to.
// Each value is one chain of operations in order of tokens, so bits depend neither on threads nor on how a prompt was cut.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "run/op.h"

namespace intaglio {
namespace {

// The sequence of a token row.
int64_t sequence_of(const StepInputs& in, int64_t row) {
  return std::upper_bound(in.first_row, in.first_row + in.s, int32_t(row)) - in.first_row - 1;
}

class ShortConv : public OpKernel {
 public:
  explicit ShortConv(OpArgs& a)
      : in_(a.context.in), x_(a.rows("x")), out_(a.rows("out")), bias_(a.optional_vector("bias")), state_(a.states("state")),
        taps_(state_.stride / x_.cols + 1) {
    const std::vector<float>& w = a.vector("w");
    w_.resize(w.size());
    for (int64_t c = 0; c < x_.cols; c++)
      for (int64_t j = 0; j < taps_; j++) w_[size_t(j * x_.cols + c)] = w[size_t(c * taps_ + j)];
  }
  void plan(Planner& p) override { p.rows(out_.rows(), out_.cols * taps_); }
  void run(int, int64_t begin, int64_t end, Scratch&) override {
    for (int64_t t = begin; t < end; t++) {
      const int64_t s = sequence_of(in_, t), at = t - in_.first_row[s];
      convolve(t, s, at);
      if (at == in_.q_len[s] - 1) keep(t, s, at);
    }
  }

 private:
  // The input `back` tokens before row t, which is number `at` of sequence s in this step; null before the sequence's start.
  const float* input(int64_t t, int64_t s, int64_t at, int64_t back) const {
    if (back <= at) return x_.row(t - back);
    return in_.state_from[s] < 0 ? nullptr : state_.slot(in_.state_from[s]) + (taps_ - 1 + at - back) * x_.cols;
  }
  void convolve(int64_t t, int64_t s, int64_t at) const {
    float* out = out_.row(t);
    const int64_t n = x_.cols;
    if (bias_) std::memcpy(out, bias_, size_t(n) * 4);
    else std::fill(out, out + n, 0.0f);
    for (int64_t j = 0; j < taps_; j++) {
      const float *x = input(t, s, at, taps_ - 1 - j), *w = w_.data() + j * n;
      if (x)
        for (int64_t c = 0; c < n; c++) out[c] += w[c] * x[c];
    }
  }
  // Writes the state after row t, the last of sequence s.
  void keep(int64_t t, int64_t s, int64_t at) const {
    for (int64_t j = 0; j < taps_ - 1; j++) {
      const float* x = input(t, s, at, taps_ - 2 - j);
      float* to = state_.slot(in_.state_to[s]) + j * x_.cols;
      if (x) std::memcpy(to, x, size_t(x_.cols) * 4);
      else std::fill(to, to + x_.cols, 0.0f);
    }
  }

  const StepInputs& in_;
  const Tensor &x_, &out_;
  const float* bias_;
  const States& state_;
  int64_t taps_;
  std::vector<float> w_;  // [taps][channels]
};

float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

// The log decays -exp(rate) of a step of size 1.
std::vector<float> log_decays(const std::vector<float>& rates) {
  std::vector<float> out;
  for (float rate : rates) out.push_back(-std::exp(rate));
  return out;
}

// Computes step sizes and log decays, which linear_attention reads. Has no state.
class Decay : public OpKernel {
 public:
  explicit Decay(OpArgs& a)
      : x_(a.rows("x")), step_(a.rows("step")), decay_(a.rows("decay")), bias_(a.optional_vector("bias")), low_(a.number("low")),
        high_(a.number("high")), rates_(log_decays(a.vector("rate"))), span_(x_.cols / int64_t(rates_.size())) {}
  void plan(Planner& p) override { p.rows(x_.rows(), x_.cols * 16); }
  void run(int, int64_t begin, int64_t end, Scratch&) override {
    for (int64_t t = begin; t < end; t++)
      for (int64_t c = 0; c < x_.cols; c++) {
        float step = std::max(low_, softplus(x_.row(t)[c] + (bias_ ? bias_[c] : 0.0f)));
        if (high_ > 0) step = std::min(high_, step);
        step_.row(t)[c] = step, decay_.row(t)[c] = rates_[size_t(c / span_)] * step;
      }
  }

 private:
  const Tensor &x_, &step_, &decay_;
  const float* bias_;
  float low_, high_;
  std::vector<float> rates_;
  int64_t span_;
};

// Calls advance(t, from, to) for each token row t of sequence s, in order. `from` is the state before the token, null if it is
// zero; `to` is the state after it, which may be the same memory.
template <typename F>
void each_token(const StepInputs& in, const States& state, int64_t s, F&& advance) {
  const float* from = in.state_from[s] < 0 ? nullptr : state.slot(in.state_from[s]);
  float* to = state.slot(in.state_to[s]);
  for (int64_t t = in.first_row[s]; t < in.first_row[s] + in.q_len[s]; t++, from = to) advance(t, from, to);
}

// A task for each head of each sequence.
class LinearAttention : public OpKernel {
 public:
  explicit LinearAttention(OpArgs& a)
      : in_(a.context.in), q_(a.rows("q")), k_(a.rows("k")), v_(a.rows("v")), out_(a.rows("out")), decay_(a.optional_rows("decay")),
        beta_(a.optional_rows("beta")), rates_(a.optional_vector("rates")), skip_(a.optional_vector("skip")), state_(a.states("state")),
        heads_(a.integer("heads")), values_(v_.cols / heads_), keys_(state_.stride / heads_ / values_),
        share_(heads_ / (k_.cols / keys_)), delta_(a.flag("delta")), by_key_(decay_ && decay_->cols > heads_), scale_(a.number("scale")) {}
  void plan(Planner& p) override {
    p.floats(values_ + keys_);
    p.phase(0, p.in().s * heads_, 1);
  }
  void run(int, int64_t begin, int64_t end, Scratch& mine) override {
    for (int64_t i = begin; i < end; i++) {
      const int64_t s = i / heads_, h = i % heads_, at = h * keys_ * values_, columns = by_key_ ? keys_ : 1;
      float* kept = mine.floats + values_;
      each_token(in_, state_, s, [&](int64_t t, const float* from, float* to) {
        for (int64_t c = 0; c < columns; c++) kept[c] = std::exp(decay_ ? decay_->row(t)[h * columns + c] : rates_[h]);
        advance(t, h, kept, from ? from + at : nullptr, to + at, mine.floats);
      });
    }
  }

 private:
  // One token of one head: S = kept S; u = beta (v - S^T k) or beta v; S = S + k u^T; out = scale S^T q + skip v. `from` is the
  // state before, null if it is zero; it may be `to`. u: scratch [values].
  void advance(int64_t t, int64_t h, const float* kept, const float* from, float* to, float* u) const {
    const int64_t n = values_;
    const float *q = q_.row(t) + h / share_ * keys_, *k = k_.row(t) + h / share_ * keys_, *v = v_.row(t) + h * n;
    const float beta = beta_ ? beta_->row(t)[h] : 1.0f, skip = skip_ ? skip_[h] : 0.0f;
    float* out = out_.row(t) + h * n;
    std::fill(u, u + n, 0.0f);
    for (int64_t i = 0; i < keys_; i++) {
      const float now = kept[by_key_ ? i : 0], key = k[i];
      float* s = to + i * n;
      if (!from) std::fill(s, s + n, 0.0f);
      else if (delta_)
        for (int64_t j = 0; j < n; j++) s[j] = from[i * n + j] * now, u[j] += s[j] * key;
      else
        for (int64_t j = 0; j < n; j++) s[j] = from[i * n + j] * now;
    }
    for (int64_t j = 0; j < n; j++) u[j] = (v[j] - u[j]) * beta, out[j] = 0;
    for (int64_t i = 0; i < keys_; i++) {
      const float key = k[i], query = q[i];
      float* s = to + i * n;
      for (int64_t j = 0; j < n; j++) s[j] += key * u[j], out[j] += s[j] * query;
    }
    for (int64_t j = 0; j < n; j++) out[j] = out[j] * scale_ + v[j] * skip;
  }

  const StepInputs& in_;
  const Tensor &q_, &k_, &v_, &out_, *decay_, *beta_;
  const float *rates_, *skip_;
  const States& state_;
  int64_t heads_, values_, keys_, share_;
  bool delta_, by_key_;
  float scale_;
};

constexpr int64_t kChannels = 64;  // channels of a task

// A recurrence whose channels do not depend on one another: a task for kChannels of them of each sequence.
class ChannelScan : public OpKernel {
 public:
  explicit ChannelScan(OpArgs& a) : in_(a.context.in), x_(a.rows("x")), out_(a.rows("out")), state_(a.states("state")) {}
  void plan(Planner& p) override { p.phase(0, p.in().s * runs(), 1); }
  void run(int, int64_t begin, int64_t end, Scratch&) override {
    for (int64_t i = begin; i < end; i++) {
      const int64_t first = i % runs() * kChannels, last = std::min(x_.cols, first + kChannels);
      each_token(in_, state_, i / runs(), [&](int64_t t, const float* from, float* to) { advance(t, first, last, from, to); });
    }
  }

 protected:
  // One token of channels [first, last). `from` and `to` as for each_token().
  virtual void advance(int64_t t, int64_t first, int64_t last, const float* from, float* to) const = 0;

  const StepInputs& in_;
  const Tensor &x_, &out_;

 private:
  int64_t runs() const { return (x_.cols + kChannels - 1) / kChannels; }
  const States& state_;
};

class SelectiveScan : public ChannelScan {
 public:
  explicit SelectiveScan(OpArgs& a)
      : ChannelScan(a), step_(a.rows("step")), b_(a.rows("b")), c_(a.rows("c")),
        skip_(a.vector("skip").data()), rates_(log_decays(a.vector("rate"))) {}

 private:
  void advance(int64_t t, int64_t first, int64_t last, const float* from, float* to) const override {
    for (int64_t c = first; c < last; c++) advance_one(t, c, from, to);
  }
  void advance_one(int64_t t, int64_t channel, const float* from, float* to) const {
    const int64_t n = b_.cols, at = channel * n;
    const float step = softplus(step_.row(t)[channel]), x = x_.row(t)[channel], *rate = rates_.data() + at, *b = b_.row(t), *c = c_.row(t);
    float y = skip_[channel] * x;
    for (int64_t i = 0; i < n; i++) {
      const float held = from ? std::exp(rate[i] * step) * from[at + i] : 0.0f;
      to[at + i] = held + step * x * b[i];
      y += to[at + i] * c[i];
    }
    out_.row(t)[channel] = y;
  }

  const Tensor &step_, &b_, &c_;
  const float* skip_;
  std::vector<float> rates_;
};

class RgLru : public ChannelScan {
 public:
  explicit RgLru(OpArgs& a)
      : ChannelScan(a), input_(a.rows("input_gate")), decay_(a.rows("decay_gate")), input_bias_(a.vector("input_bias").data()),
        decay_bias_(a.vector("decay_bias").data()) {
    for (float rate : a.vector("rate")) rates_.push_back(-8.0f * softplus(rate));
  }

 private:
  void advance(int64_t t, int64_t first, int64_t last, const float* from, float* to) const override {
    for (int64_t c = first; c < last; c++) {
      const float log = rates_[size_t(c)] * sigmoid(decay_.row(t)[c] + decay_bias_[c]);
      const float kept = std::exp(log), scale = in_.positions[t] ? std::sqrt(-std::expm1(2 * log)) : 1.0f;
      const float x = x_.row(t)[c] * sigmoid(input_.row(t)[c] + input_bias_[c]) * scale;
      to[c] = out_.row(t)[c] = from ? kept * from[c] + x : x;
    }
  }
  static float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

  const Tensor &input_, &decay_;
  const float *input_bias_, *decay_bias_;
  std::vector<float> rates_;
};

const Registered<ShortConv> short_conv("short_conv");
const Registered<Decay> decay("decay");
const Registered<LinearAttention> linear_attention("linear_attention");
const Registered<SelectiveScan> selective_scan("selective_scan");
const Registered<RgLru> rg_lru("rg_lru");

}  // namespace
}  // namespace intaglio
