// Ops norm (RMS, layer or L2 norm of rows, times weight plus bias; kind `none`: weight and bias alone) and moment (the mean,
// RMS or standard deviation of each row).
#include "run/op.h"

namespace intaglio {
namespace {

class Norm : public OpKernel {
 public:
  explicit Norm(OpArgs& a)
      : kernels_(a.context.kernels), x_(a.rows("x")), out_(a.rows("out")), residual_(a.optional_rows("residual")),
        weight_(a.optional_vector("weight")), bias_(a.optional_vector("bias")), group_(a.integer("group")),
        columns_(group_ && weight_ && int64_t(a.vector("weight").size()) == out_.cols),
        kind_(a.choice<NormKind>("norm", {{"rms", NormKind::Rms}, {"layer", NormKind::Layer}, {"l2", NormKind::L2}, {"none", NormKind::None}})),
        eps_(a.number("eps")), offset_(a.number("offset")) {}
  void plan(Planner& p) override { p.rows(out_.rows(), out_.cols); }
  void run(int, int64_t begin, int64_t end, Scratch&) override {
    const NormArgs a{x_.row(0), weight_, bias_, residual_ ? residual_->row(0) : nullptr, out_.row(0), x_.ld,
                     residual_ ? residual_->ld : 0, out_.ld, out_.cols, group_ ? group_ : out_.cols, kind_, eps_, offset_};
    for (int64_t r = begin; r < end; r++)
      if (columns_) norm_groups(a, r);
      else kernels_.norm_row(a, r);
  }

 private:
  // A row whose weight and bias have a value for each column: each group as a row of its own.
  void norm_groups(const NormArgs& a, int64_t row) const {
    for (int64_t i = 0; i < a.width; i += a.group) {
      NormArgs one = a;
      one.width = a.group, one.x += i, one.out += i, one.weight += i;
      if (one.bias) one.bias += i;
      if (one.residual) one.residual += i;
      kernels_.norm_row(one, row);
    }
  }

  const Kernels& kernels_;
  const Tensor &x_, &out_, *residual_;
  const float *weight_, *bias_;
  int64_t group_;
  bool columns_;  // with groups: weight and bias have a value for each column
  NormKind kind_;
  float eps_, offset_;
};

class Moment : public OpKernel {
 public:
  explicit Moment(OpArgs& a)
      : kernels_(a.context.kernels), x_(a.rows("x")), out_(a.rows("out")),
        of_(a.choice<MomentOf>("of", {{"mean", MomentOf::Mean}, {"rms", MomentOf::Rms}, {"std", MomentOf::Std}})) {}
  void plan(Planner& p) override { p.rows(out_.rows(), x_.cols); }
  void run(int, int64_t begin, int64_t end, Scratch&) override {
    for (int64_t r = begin; r < end; r++) *out_.row(r) = kernels_.moment(x_.row(r), x_.cols, of_);
  }

 private:
  const Kernels& kernels_;
  const Tensor &x_, &out_;
  MomentOf of_;
};

const Registered<Norm> norm("norm");
const Registered<Moment> moment("moment");

}  // namespace
}  // namespace intaglio
