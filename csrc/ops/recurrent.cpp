// Ops with recurrent state in slots. A step reads a sequence's slot state_from and writes its slot state_to.
// Each value is one chain of operations in order of tokens, so bits depend neither on threads nor on how a prompt was cut.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "ops/sequences.h"
#include "run/op.h"

namespace intaglio {
namespace {

// All tokens of sequence s, with its state.
StateRun run_of(const StepInputs& in, const States& state, int64_t s) {
  return {in.first_row[s], in.q_len[s], in.state_from[s] < 0 ? nullptr : state.slot(in.state_from[s]), state.slot(in.state_to[s])};
}

// A task for kPart channels of each token.
class ShortConv : public OpKernel {
 public:
  explicit ShortConv(OpArgs& a)
      : kernels_(a.context.kernels), in_(a.context.in), x_(a.rows("x")), out_(a.rows("out")), bias_(a.optional_vector("bias")),
        state_(a.states("state")), taps_(state_.stride / x_.cols + 1), parts_((x_.cols + kPart - 1) / kPart) {
    const std::vector<float>& w = a.vector("w");
    w_.resize(w.size());
    for (int64_t c = 0; c < x_.cols; c++)
      for (int64_t j = 0; j < taps_; j++) w_[size_t(taps_ * first_of(c / kPart) + j * width_of(c / kPart) + c % kPart)] = w[size_t(c * taps_ + j)];
  }
  void plan(Planner& p) override { p.rows(out_.rows() * parts_, std::min(x_.cols, kPart) * taps_); }
  void run(int, int64_t begin, int64_t end, Scratch&) override {
    std::vector<const float*> inputs(size_t(taps_), nullptr);
    for (int64_t i = begin; i < end; i++) {
      const int64_t t = i / parts_, first = first_of(i % parts_), s = sequence_of(in_, t), at = t - in_.first_row[s];
      const ConvArgs a{w_.data() + taps_ * first, bias_ ? bias_ + first : nullptr, taps_, width_of(i % parts_)};
      for (int64_t j = 0; j < taps_; j++) inputs[size_t(j)] = input(t, s, at, taps_ - 1 - j, first);
      kernels_.conv_row(a, inputs.data(), out_.row(t) + first);
      if (at == in_.q_len[s] - 1) keep(inputs, s, first, a.width);
    }
  }

 private:
  static constexpr int64_t kPart = 1024;
  static int64_t first_of(int64_t part) { return part * kPart; }
  int64_t width_of(int64_t part) const { return std::min(kPart, x_.cols - first_of(part)); }

  // The input `back` tokens before row t, which is number `at` of sequence s in this step, from column `first`; null before the
  // sequence's start.
  const float* input(int64_t t, int64_t s, int64_t at, int64_t back, int64_t first) const {
    if (back <= at) return x_.row(t - back) + first;
    return in_.state_from[s] < 0 ? nullptr : state_.slot(in_.state_from[s]) + (taps_ - 1 + at - back) * x_.cols + first;
  }
  // Writes the state after the last token of sequence s, whose inputs these are.
  void keep(const std::vector<const float*>& inputs, int64_t s, int64_t first, int64_t width) const {
    for (int64_t j = 0; j < taps_ - 1; j++) {
      const float* x = inputs[size_t(j + 1)];
      float* to = state_.slot(in_.state_to[s]) + j * x_.cols + first;
      if (x) std::memcpy(to, x, size_t(width) * 4);
      else std::fill(to, to + width, 0.0f);
    }
  }

  const Kernels& kernels_;
  const StepInputs& in_;
  const Tensor &x_, &out_;
  const float* bias_;
  const States& state_;
  int64_t taps_, parts_;
  std::vector<float> w_;  // [parts][taps][channels of the part]
};

float softplus(float x) { return std::max(x, 0.0f) + std::log1p(std::exp(-std::abs(x))); }

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
      : kernels_(a.context.kernels), x_(a.rows("x")), step_(a.rows("step")), decay_(a.rows("decay")), bias_(a.optional_vector("bias")),
        low_(a.number("low")), high_(a.number("high")), floor_(a.number("floor")) {
    const std::vector<float> rates = log_decays(a.vector("rate"));
    for (float rate : rates) rates_.insert(rates_.end(), size_t(x_.cols) / rates.size(), rate);
  }
  void plan(Planner& p) override { p.rows(x_.rows(), x_.cols * 8); }
  void run(int, int64_t begin, int64_t end, Scratch&) override {
    const DecayArgs a{rates_.data(), bias_, x_.cols, low_, high_, floor_};
    for (int64_t t = begin; t < end; t++) kernels_.decay_row(a, x_.row(t), step_.row(t), decay_.row(t));
  }

 private:
  const Kernels& kernels_;
  const Tensor &x_, &step_, &decay_;
  const float* bias_;
  float low_, high_, floor_;
  std::vector<float> rates_;  // of each column
};

// A task for each head of each sequence.
class LinearAttention : public OpKernel {
 public:
  explicit LinearAttention(OpArgs& a)
      : kernels_(a.context.kernels), in_(a.context.in), q_(a.rows("q")), k_(a.rows("k")), v_(a.rows("v")), out_(a.rows("out")),
        decay_(a.optional_rows("decay")), beta_(a.optional_rows("beta")), state_(a.states("state")), heads_(a.integer("heads")) {
    const int64_t values = v_.cols / heads_, keys = state_.stride / heads_ / values;
    args_.rates = a.optional_vector("rates"), args_.skip = a.optional_vector("skip");
    args_.keys = keys, args_.values = values, args_.share = heads_ / (k_.cols / keys);
    args_.delta = a.flag("delta"), args_.by_key = decay_ && decay_->cols > heads_, args_.scale = a.number("scale");
  }
  void plan(Planner& p) override {
    p.floats(args_.scratch());
    p.phase(0, p.in().s * heads_, 1);
  }
  void run(int, int64_t begin, int64_t end, Scratch& mine) override {
    StateAttentionArgs a = args_;
    a.q = q_.row(0), a.ld_q = q_.ld, a.k = k_.row(0), a.ld_k = k_.ld, a.v = v_.row(0), a.ld_v = v_.ld;
    a.out = out_.row(0), a.ld_out = out_.ld;
    if (decay_) a.decay = decay_->row(0), a.ld_decay = decay_->ld;
    if (beta_) a.beta = beta_->row(0), a.ld_beta = beta_->ld;
    for (int64_t i = begin; i < end; i++) kernels_.attend_state(a, run_of(in_, state_, i / heads_), i % heads_, mine.floats);
  }

 private:
  const Kernels& kernels_;
  const StepInputs& in_;
  const Tensor &q_, &k_, &v_, &out_, *decay_, *beta_;
  const States& state_;
  int64_t heads_;
  StateAttentionArgs args_{};
};

// A recurrence whose channels do not depend on one another: a task for kColumns of them of each sequence.
class ChannelScan : public OpKernel {
 public:
  explicit ChannelScan(OpArgs& a)
      : kernels_(a.context.kernels), in_(a.context.in), x_(a.rows("x")), out_(a.rows("out")), state_(a.states("state")) {}
  void plan(Planner& p) override { p.phase(0, p.in().s * blocks(), p.in().t == p.in().s ? p.chunk(p.in().s * blocks()) : 1); }

 protected:
  int64_t blocks() const { return (x_.cols + kColumns - 1) / kColumns; }
  // Calls advance(tokens of a sequence, first channel) for each task.
  template <typename F>
  void each_block(int64_t begin, int64_t end, F&& advance) const {
    for (int64_t i = begin; i < end; i++) advance(run_of(in_, state_, i / blocks()), i % blocks() * kColumns);
  }

  const Kernels& kernels_;
  const StepInputs& in_;
  const Tensor &x_, &out_;
  const States& state_;
};

class SelectiveScan : public ChannelScan {
 public:
  explicit SelectiveScan(OpArgs& a)
      : ChannelScan(a), step_(a.rows("step")), b_(a.rows("b")), c_(a.rows("c")), skip_(a.vector("skip").data()) {
    const std::vector<float> rates = log_decays(a.vector("rate"));
    rates_.reserve(rates.size());
    for (int64_t first = 0; first < x_.cols; first += kColumns)
      for (int64_t i = 0; i < b_.cols; i++)
        for (int64_t c = first; c < std::min(x_.cols, first + kColumns); c++) rates_.push_back(rates[size_t(c * b_.cols + i)]);
  }
  void run(int, int64_t begin, int64_t end, Scratch&) override {
    const ScanArgs a{x_.row(0), step_.row(0), b_.row(0), c_.row(0), rates_.data(), skip_, out_.row(0),
                     x_.ld, step_.ld, b_.ld, c_.ld, out_.ld, x_.cols, b_.cols};
    each_block(begin, end, [&](const StateRun& run, int64_t first) { kernels_.scan_channels(a, run, first); });
  }

 private:
  const Tensor &step_, &b_, &c_;
  const float* skip_;
  std::vector<float> rates_;  // log decays of a step of 1, in the order of the state
};

class RgLru : public ChannelScan {
 public:
  explicit RgLru(OpArgs& a)
      : ChannelScan(a), input_(a.rows("input_gate")), decay_(a.rows("decay_gate")), input_bias_(a.vector("input_bias").data()),
        decay_bias_(a.vector("decay_bias").data()) {
    for (float rate : a.vector("rate")) rates_.push_back(-8.0f * softplus(rate));
  }
  void run(int, int64_t begin, int64_t end, Scratch&) override {
    const LruArgs a{x_.row(0), input_.row(0), decay_.row(0), input_bias_, decay_bias_, rates_.data(), out_.row(0),
                    in_.positions, x_.ld, input_.ld, decay_.ld, out_.ld, x_.cols};
    each_block(begin, end, [&](const StateRun& run, int64_t first) { kernels_.lru_channels(a, run, first); });
  }

 private:
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
