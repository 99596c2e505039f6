// Ops that copy rows: embed (lookup by token id or position), select (rows to sample), permute (columns in another order),
// concat (the columns of two tensors side by side).
#include <cstring>

#include "run/op.h"

namespace intaglio {
namespace {

class Embed : public OpKernel {
 public:
  explicit Embed(OpArgs& a)
      : in_(a.context.in), w_(a.weight("w")), out_(a.rows("out")), scale_(a.number("scale")),
        ids_(a.choice<Ids>("index", {{"tokens", &StepInputs::tokens}, {"positions", &StepInputs::positions}})) {
    a.ignore({"tokens"});
  }
  void plan(Planner& p) override { p.rows(out_.rows(), out_.cols); }
  void run(int, int64_t begin, int64_t end, Scratch&) override {
    for (int64_t t = begin; t < end; t++) {
      float* out = out_.row(t);
      unpack_row(w_, (in_.*ids_)[t], out);
      for (int64_t i = 0; i < w_.k; i++) out[i] *= scale_;
    }
  }

 private:
  using Ids = const int32_t* StepInputs::*;
  const StepInputs& in_;
  const Weight& w_;
  const Tensor& out_;
  float scale_;
  Ids ids_;
};

class Select : public OpKernel {
 public:
  explicit Select(OpArgs& a) : in_(a.context.in), x_(a.rows("x")), out_(a.rows("out")) { a.ignore({"rows"}); }
  void plan(Planner& p) override { p.rows(out_.rows(), out_.cols); }
  void run(int, int64_t begin, int64_t end, Scratch&) override {
    for (int64_t r = begin; r < end; r++) std::memcpy(out_.row(r), x_.row(in_.rows[r]), size_t(out_.cols) * 4);
  }

 private:
  const StepInputs& in_;
  const Tensor &x_, &out_;
};

class Permute : public OpKernel {
 public:
  explicit Permute(OpArgs& a) : x_(a.rows("x")), out_(a.rows("out")), order_(a.vector("order")) {}
  void plan(Planner& p) override { p.rows(out_.rows(), out_.cols); }
  void run(int, int64_t begin, int64_t end, Scratch&) override {
    for (int64_t r = begin; r < end; r++) {
      const float* from = x_.row(r);
      float* to = out_.row(r);
      for (int64_t i = 0; i < out_.cols; i++) to[i] = from[int(order_[size_t(i)])];
    }
  }

 private:
  const Tensor &x_, &out_;
  const std::vector<float>& order_;  // integers below 2^24, which float holds exactly
};

class Concat : public OpKernel {
 public:
  explicit Concat(OpArgs& a) : a_(a.rows("a")), b_(a.rows("b")), out_(a.rows("out")) {}
  void plan(Planner& p) override { p.rows(out_.rows(), out_.cols); }
  void run(int, int64_t begin, int64_t end, Scratch&) override {
    for (int64_t r = begin; r < end; r++) {
      std::memcpy(out_.row(r), a_.row(r), size_t(a_.cols) * 4);
      std::memcpy(out_.row(r) + a_.cols, b_.row(r), size_t(b_.cols) * 4);
    }
  }

 private:
  const Tensor &a_, &b_, &out_;
};

const Registered<Embed> embed("embed");
const Registered<Select> select("select");
const Registered<Permute> permute("permute");
const Registered<Concat> concat("concat");

}  // namespace
}  // namespace intaglio
