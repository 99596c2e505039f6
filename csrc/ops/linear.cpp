// Ops linear (one weight) and head_linear (one matrix for each head). First the rows of x are rounded, then the columns of the
// product are divided among the threads.
#include <cstring>

#include "ops/names.h"
#include "ops/product.h"

namespace intaglio {
namespace {

constexpr int64_t kPrivate = 16384;  // if x has at most this many values, each thread rounds all rows itself
constexpr int64_t kManyRows = 256;  // rows whose prepared values may not fit in L2, so that units taken together share reading them
constexpr int64_t kFetch = 1024, kFetchMost = 128 << 10;  // bytes of weights prefetched while waiting: in each turn, in total

class Linear : public OpKernel {
 public:
  enum Part { Prepare, Product };
  explicit Linear(OpArgs& a)
      : context_(a.context), x_(a.rows("x")), out_(a.rows("out")), residual_(a.optional_rows("residual")), w_(a.weight("w")),
        bias_(a.optional_vector("bias")), x_bf16_(x_is_bf16(a)), scale_(a.number("scale")),
        activation_(a.choice("activation", activations())) {
    if (a.flag("glu") != w_.glu) throw std::invalid_argument("the op's glu differs from that of its packed weight");
  }

  void plan(Planner& p) override {
    const int64_t rows = out_.rows(), units = w_.units(), bytes = bytes_of_rows(w_, x_bf16_, rows);
    if (each_thread_rounds()) {
      p.own_rows(bytes);
    } else {
      p.workspace(bytes);
      p.phase(Prepare, rows, p.chunk(rows));
    }
    const int64_t parts = rows >= kManyRows ? 8 : 16;  // of a thread's columns, taken one at a time
    p.phase(Product, (rows + kRows - 1) / kRows * units, std::max<int64_t>(1, units / (parts * p.threads())));
  }

  // If each thread rounds x itself, it does so before its first task.
  void run(int part, int64_t begin, int64_t end, Scratch& mine) override {
    const bool own = each_thread_rounds();
    const LinearArgs a = args(own ? mine.rows : context_.workspace);
    if (part == Prepare) return prepare(a, begin, end);
    if (own && mine.holds != this) {
      prepare(a, 0, a.x.m);
      mine.holds = this;
    }
    const int64_t units = w_.units();
    for (int64_t i = begin, count; i < end; i += count) {
      const int64_t first = i / units * kRows;
      count = std::min(end - i, units - i % units);
      context_.kernels.linear_units(a, first, std::min<int64_t>(kRows, a.x.m - first), i % units, count, mine.floats);
    }
  }

  bool fetches() const override { return true; }
  // Prefetches the weights that the thread is likely to use first.
  void fetch_ahead(int64_t first, int64_t turn) const override {
    const int64_t from = first % w_.units() * w_.unit_bytes() + turn * kFetch;
    const int64_t to = std::min(from + kFetch, w_.units() * w_.unit_bytes());
    if ((turn + 1) * kFetch > kFetchMost) return;
    for (int64_t b = from; b < to; b += 64) __builtin_prefetch(w_.data + b, 0, 2);
  }

 private:
  // True if each thread rounds all rows of x into its own scratch: for few values that is faster than a phase of its own.
  bool each_thread_rounds() const { return out_.rows() * w_.padded_k <= kPrivate; }
  LinearArgs args(uint8_t* rows) const {
    LinearArgs a{&w_, {}, x_bf16_, out_.row(0), out_.ld, bias_, residual_ ? residual_->row(0) : nullptr,
                 residual_ ? residual_->ld : 0, scale_, activation_};
    lay_rows(w_, x_bf16_, out_.rows(), rows, &a.x);
    return a;
  }
  void prepare(const LinearArgs& a, int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; row++) context_.kernels.prepare_row(w_, x_bf16_, x_.row(row), a.x, row);
  }

  const Context& context_;
  const Tensor &x_, &out_, *residual_;
  const Weight& w_;
  const float* bias_;
  bool x_bf16_;
  float scale_;
  Act activation_;
};

// Rounds x head by head into [head][token]. Copies the columns of a head beyond its matrix to the result.
class HeadLinear : public OpKernel {
 public:
  enum Part { Prepare, Product };
  explicit HeadLinear(OpArgs& a)
      : context_(a.context), x_(a.rows("x")), out_(a.rows("out")), w_(a.weight("w")), heads_(a.shape("w")[0]), n_(a.shape("w")[1]),
        width_(x_.cols / heads_), rest_(width_ - w_.k), units_(w_.units() / heads_) {}

  void plan(Planner& p) override {
    const int64_t t = p.in().t, tasks = w_.units() * ((t + kRows - 1) / kRows);
    p.workspace(heads_ * bytes_of_rows(w_, false, t));
    p.phase(Prepare, t * heads_, p.chunk(t * heads_));
    p.phase(Product, tasks, std::max<int64_t>(1, tasks / (16 * p.threads())));
  }

  void run(int part, int64_t begin, int64_t end, Scratch& mine) override {
    const int64_t t = out_.rows(), stride = bytes_of_rows(w_, false, t), blocks = (t + kRows - 1) / kRows;
    for (int64_t i = begin; i < end; i++)
      if (part == Prepare) prepare(i / heads_, i % heads_, stride);
      else product(i / (units_ * blocks), i / units_ % blocks * kRows, i % units_, stride, mine);
  }

 private:
  void prepare(int64_t t, int64_t head, int64_t stride) const {
    const float* from = x_.row(t) + head * width_;
    Rows rows;
    lay_rows(w_, false, out_.rows(), context_.workspace + head * stride, &rows);
    context_.kernels.prepare_row(w_, false, from, rows, t);
    std::memcpy(out_.row(t) + head * (n_ + rest_) + n_, from + w_.k, size_t(rest_) * 4);
  }
  void product(int64_t head, int64_t first, int64_t unit, int64_t stride, Scratch& mine) const {
    const int64_t t = out_.rows();
    const Weight own = matrix_of(w_, head, units_, n_);
    LinearArgs a{&own, {}, false, out_.row(0) + head * (n_ + rest_), out_.ld, nullptr, nullptr, 0, 1.0f, Act::None};
    lay_rows(w_, false, t, context_.workspace + head * stride, &a.x);
    context_.kernels.linear_units(a, first, std::min<int64_t>(kRows, t - first), unit, 1, mine.floats);
  }

  const Context& context_;
  const Tensor &x_, &out_;
  const Weight& w_;
  int64_t heads_, n_, width_, rest_, units_;
};

const Registered<Linear> linear("linear");
const Registered<HeadLinear> head_linear("head_linear");

}  // namespace
}  // namespace intaglio
