// Ops rope (rotary position embedding) and sinusoid (rows of sines and cosines). RopeTable computes the cosines and sines
// of a step's positions once for all ops with the same frequencies.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "run/op.h"

namespace intaglio {
namespace {

class RopeTable : public Shared, public Work {
 public:
  RopeTable(const StepInputs& in, const std::vector<float>& frequencies, float factor, int first)
      : in_(in), frequencies_(frequencies), factor_(factor), first_(first) {}
  bool same_as(const Shared& other) const override {
    auto& o = static_cast<const RopeTable&>(other);
    return &o.frequencies_ == &frequencies_ && o.factor_ == factor_ && o.first_ == first_;
  }
  std::any plan(Planner& p) override {
    const size_t n = size_t(p.in().t) * frequencies_.size();
    if (cosines_.size() < n) cosines_.resize(n), sines_.resize(n);
    p.begin(this, first_op);
    p.phase(0, p.in().t, p.chunk(p.in().t));
    return {};
  }
  void run(int, int64_t begin, int64_t end, Scratch&) override {
    const size_t pairs = frequencies_.size();
    for (int64_t t = begin; t < end; t++)
      for (size_t i = 0; i < pairs; i++) {
        const double angle = double(float(in_.positions[t] + first_) * frequencies_[i]);
        cosines_[size_t(t) * pairs + i] = float(std::cos(angle) * double(factor_));
        sines_[size_t(t) * pairs + i] = float(std::sin(angle) * double(factor_));
      }
  }
  int64_t pairs() const { return int64_t(frequencies_.size()); }
  const float* cosines(int64_t t) const { return cosines_.data() + t * pairs(); }
  const float* sines(int64_t t) const { return sines_.data() + t * pairs(); }

 private:
  const StepInputs& in_;
  const std::vector<float>& frequencies_;
  float factor_;
  int first_;  // added to each position
  std::vector<float> cosines_, sines_;  // [T, pairs]
};

class Rope : public OpKernel {
 public:
  explicit Rope(OpArgs& a)
      : x_(a.rows("x")), out_(a.rows("out")), table_(a.share<RopeTable>(a.context.in, a.vector("frequencies"), a.number("factor"), 0)),
        head_dim_(a.integer("head_dim")), interleaved_(a.choice<bool>("style", {{"half", false}, {"interleaved", true}})),
        trailing_(a.flag("trailing")) {
    a.ignore({"positions"});
  }
  void plan(Planner& p) override { p.rows(out_.rows(), out_.cols); }
  void run(int, int64_t begin, int64_t end, Scratch&) override {
    const int64_t pairs = table_.pairs(), step = interleaved_ ? 2 : 1, gap = interleaved_ ? 1 : pairs;
    const int64_t still = head_dim_ - 2 * pairs, lead = trailing_ ? still : 0, rest = trailing_ ? 0 : 2 * pairs;
    for (int64_t t = begin; t < end; t++) {
      const float *c = table_.cosines(t), *s = table_.sines(t);
      for (int64_t h = 0; h < out_.cols; h += head_dim_) {
        const float *own = x_.row(t) + h, *in = own + lead;
        float *to = out_.row(t) + h, *out = to + lead;
        for (int64_t i = 0; i < pairs; i++) {
          const float a = in[i * step], b = in[i * step + gap];
          out[i * step] = a * c[i] - b * s[i];
          out[i * step + gap] = b * c[i] + a * s[i];
        }
        std::memcpy(to + rest, own + rest, size_t(still) * 4);
      }
    }
  }

 private:
  const Tensor &x_, &out_;
  RopeTable& table_;
  int64_t head_dim_;
  bool interleaved_, trailing_;
};

class Sinusoid : public OpKernel {
 public:
  explicit Sinusoid(OpArgs& a)
      : out_(a.rows("out")), table_(a.share<RopeTable>(a.context.in, a.vector("frequencies"), 1.0f, int(a.integer("first")))) {
    a.ignore({"positions"});
  }
  void plan(Planner& p) override { p.rows(out_.rows(), out_.cols); }
  void run(int, int64_t begin, int64_t end, Scratch&) override {
    for (int64_t t = begin; t < end; t++) {
      std::copy_n(table_.sines(t), table_.pairs(), out_.row(t));
      std::copy_n(table_.cosines(t), table_.pairs(), out_.row(t) + table_.pairs());
    }
  }

 private:
  const Tensor& out_;
  RopeTable& table_;
};

const Registered<Rope> rope("rope");
const Registered<Sinusoid> sinusoid("sinusoid");

}  // namespace
}  // namespace intaglio
