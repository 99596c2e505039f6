// Ops of mixture-of-experts layers: route, and experts (sort tokens by expert, two grouped products, sum of each token's
// results). A token's result is one chain of additions over its experts in their order, so its bits do not depend on the
// batch or the number of threads.
#include "ops/grouped.h"
#include "ops/names.h"

namespace intaglio {
namespace {

constexpr int kSlices = 16;  // slices of a grouped product for each thread

int64_t up_to(const char* name, int64_t value, int64_t most) {
  if (value > most)
    throw std::invalid_argument(std::string(name) + "=" + std::to_string(value) + "; the host's route supports up to " + std::to_string(most));
  return value;
}

class Route : public OpKernel {
 public:
  explicit Route(OpArgs& a)
      : context_(a.context), kernels_(a.context.kernels), logits_(a.rows("logits")), weights_(a.rows("weights")), ids_(a.rows("ids")) {
    args_.bias = a.optional_vector("bias");
    factors_ = a.optional_vector("factors");
    if ((args_.table = a.optional_vector("table")))
      for (const float id : a.vector("table"))
        if (id < 0 || id >= float(logits_.cols)) throw std::invalid_argument("table lists expert " + std::to_string(int64_t(id)) + " of " + std::to_string(logits_.cols));
    args_.top = up_to("top", a.integer("top"), kMaxTop);
    args_.groups = up_to("groups", a.integer("groups"), kMaxGroups);
    args_.kept = a.integer("kept_groups"), args_.group_best = a.integer("group_best");
    args_.score = a.choice<RouteScore>(
        "score", {{"softmax", RouteScore::Softmax}, {"sigmoid", RouteScore::Sigmoid}, {"sqrt_softplus", RouteScore::SqrtSoftplus},
                  {"chosen", RouteScore::Chosen}, {"sparsemixer", RouteScore::Sparsemixer}});
    args_.normalise = a.flag("normalise"), args_.scale = a.number("scale"), args_.jitter = a.number("jitter");
    args_.ld_logits = logits_.ld, args_.ld_weights = weights_.ld, args_.ld_ids = ids_.ld, args_.experts = logits_.cols;
  }
  void plan(Planner& p) override { p.rows(ids_.rows(), logits_.cols); }
  void run(int, int64_t begin, int64_t end, Scratch& mine) override {
    RouteArgs a = args_;
    a.tokens = context_.in.tokens, a.logits = logits_.row(0), a.weights = weights_.row(0), a.ids = ids_.integers(0);
    for (int64_t t = begin; t < end; t++) {
      kernels_.route_row(a, t, mine.floats);
      for (int64_t j = 0; factors_ && j < a.top; j++) weights_.row(t)[j] *= factors_[ids_.integers(t)[j]];
    }
  }

 private:
  const Context& context_;
  const Kernels& kernels_;
  const Tensor &logits_, &weights_, &ids_;
  const float* factors_;
  RouteArgs args_{};
};

// The k values of x in the column order of an expert's matrix, copied to `buffer`; x itself if there are no orders (null).
// Orders are integers below 2^24, which float holds exactly.
const float* in_order(const float* orders, int64_t expert, const float* x, int64_t k, float* buffer) {
  if (!orders) return x;
  for (int64_t i = 0; i < k; i++) buffer[i] = x[int64_t(orders[expert * k + i])];
  return buffer;
}

class Experts : public OpKernel {
 public:
  enum Part { Sort, RoundX, Inner, RoundInner, Outer, Combine };
  explicit Experts(OpArgs& a)
      : context_(a.context), x_(a.rows("x")), weights_(a.rows("weights")), ids_(a.rows("ids")), out_(a.rows("out")),
        residual_(a.optional_rows("residual")), up_(a.weight("up")), down_(a.weight("down")), up_bias_(a.optional_vector("gate_bias")),
        down_bias_(a.optional_vector("down_bias")), order_(a.optional_vector("order")), down_order_(a.optional_vector("down_order")),
        experts_(a.shape("up")[0]), inner_(a.shape("up")[1]), top_(ids_.cols), slots_(a.integer("slots")),
        n_(out_.cols / std::max<int64_t>(1, slots_)), first_(a.integer("first")),
        x_bf16_(x_is_bf16(a)), scale_input_(a.flag("scale_input")), activation_(a.choice("activation", activations())),
        alpha_(a.number("alpha")), limit_(a.number("limit")), shift_(a.number("shift")),
        grouped_(experts_, top_, int64_t(kSlices) * a.context.threads) {
    if (!up_bias_) up_bias_ = a.optional_vector("up_bias");
    a.ignore({"gate", "up_bias", "rank", "ranks"});  // gate is packed with up, and biases of up follow those of gate
    tokens_.assign(size_t(std::max(a.integer("of"), experts_)), 0);
    const std::vector<int64_t> held = a.integers("held");
    turns_.assign(tokens_.size(), {});
    if (held.empty())
      for (int64_t m = 0; m < experts_; m++) turns_.at(size_t(first_ + m)) = {m, 0, 1};
    place(held, a.integers("copy"), a.integers("copies"));
  }

  const std::vector<int64_t>* expert_tokens() const override { return &tokens_; }
  void place_experts(const std::vector<int64_t>& held, const std::vector<int64_t>& copy, const std::vector<int64_t>& copies) override {
    if (int64_t(held.size()) != experts_) throw std::invalid_argument("the op has another number of experts");
    turns_.assign(tokens_.size(), {});
    place(held, copy, copies);
  }

  void plan(Planner& p) override {
    const int64_t t = p.in().t, entries = t * top_, slices = int64_t(kSlices) * context_.threads;
    p.workspace(areas(t).end);
    p.floats(std::max(up_.k, down_.k));
    p.single(Sort);
    p.phase(RoundX, entries, p.chunk(entries));
    p.phase(Inner, slices, 1);
    p.phase(RoundInner, entries, p.chunk(entries));
    p.phase(Outer, slices, 1);
    p.phase(Combine, t, p.chunk(t));
  }

  void run(int part, int64_t begin, int64_t end, Scratch& mine) override {
    const Areas at = areas(context_.in.t);
    for (int64_t i = begin; i < end; i++) switch (part) {
        case Sort: sort(); break;
        case RoundX: round_x(at, i, mine); break;
        case Inner: inner(at, i, mine); break;
        case RoundInner: round_inner(at, i, mine); break;
        case Outer: outer(at, i, mine); break;
        case Combine: combine(at, i); break;
      }
  }

 private:
  // Offsets into the workspace, after the tables of Grouped: x rounded for each entry, the inner rows, these rounded, and the
  // result of each entry.
  struct Areas {
    int64_t x, inner, rounded, out, end;
  };
  Areas areas(int64_t t) const {
    const int64_t entries = t * top_, most = entries + std::min(experts_, entries);  // one more for each expert, whose rows begin aligned
    Areas a;
    a.x = aligned(grouped_.bytes(t));
    a.inner = a.x + aligned(most * bytes_of_rows(up_, x_bf16_, 1));
    a.rounded = a.inner + aligned(entries * inner_ * 4);
    a.out = a.rounded + aligned(most * bytes_of_rows(down_, x_bf16_, 1));
    a.end = a.out + aligned(entries * n_ * 4 + kAlign);
    return a;
  }
  uint8_t* at(int64_t offset) const { return context_.workspace + offset; }
  float* floats_at(int64_t offset) const { return reinterpret_cast<float*>(context_.workspace + offset); }

  void place(const std::vector<int64_t>& held, const std::vector<int64_t>& copy, const std::vector<int64_t>& copies) {
    for (size_t m = 0; m < held.size(); m++) turns_.at(size_t(held[m])) = {int64_t(m), copy.at(m), copies.at(m)};
  }

  void sort() {
    for (int64_t t = 0; t < context_.in.t; t++)
      for (int64_t j = 0; j < top_; j++) tokens_[size_t(ids_.integers(t)[j])]++;
    grouped_.place(context_.in.t, context_.workspace);
    grouped_.sort([&](int64_t t, int64_t j) {
      const Turn& turn = turns_[size_t(ids_.integers(t)[j])];
      return turn.matrix >= 0 && t % turn.copies == turn.copy ? turn.matrix : -1;  // -1: computed by another rank
    });
    int64_t x = 0, rounded = 0;
    for (Active& a : grouped_) {
      a.at[0] = x, a.at[1] = rounded;
      x += bytes_of_rows(up_, x_bf16_, a.rows), rounded += bytes_of_rows(down_, x_bf16_, a.rows);
    }
  }

  void round_x(const Areas& area, int64_t entry, Scratch& mine) const {
    if (entry >= grouped_.entries()) return;  // the plan has a task for each possible entry; some belong to other ranks' experts
    const Active& a = grouped_.active_of(entry);
    const int64_t t = grouped_.pair(entry) / top_, j = grouped_.pair(entry) % top_;
    const float* x = in_order(order_, a.matrix, x_.row(t), up_.k, mine.floats);
    if (scale_input_) {
      const float weight = weights_.row(t)[j];
      for (int64_t i = 0; i < up_.k; i++) mine.floats[i] = x[i] * weight;
      x = mine.floats;
    }
    Rows rows;
    lay_rows(up_, x_bf16_, a.rows, at(area.x + a.at[0]), &rows);
    context_.kernels.prepare_row(up_, x_bf16_, x, rows, entry - a.first);
  }

  void inner(const Areas& area, int64_t slice, Scratch& mine) const {
    const int64_t units = up_.units() / experts_;
    grouped_.each_run(slice, units, [&](const Active& a, int64_t unit, int64_t count) {
      const Weight w = matrix_of(up_, a.matrix, units, inner_);
      LinearArgs args{&w, {}, x_bf16_, floats_at(area.inner) + a.first * inner_, inner_,
                      up_bias_ ? up_bias_ + a.matrix * (w.glu ? 2 : 1) * inner_ : nullptr, nullptr, 0, 1.0f, activation_, alpha_, limit_, shift_};
      lay_rows(w, x_bf16_, a.rows, at(area.x + a.at[0]), &args.x);
      products(args, a.rows, unit, count, mine);
    });
  }

  void round_inner(const Areas& area, int64_t entry, Scratch& mine) const {
    if (entry >= grouped_.entries()) return;
    const Active& a = grouped_.active_of(entry);
    const float* x = in_order(down_order_, a.matrix, floats_at(area.inner) + entry * inner_, inner_, mine.floats);
    Rows rows;
    lay_rows(down_, x_bf16_, a.rows, at(area.rounded + a.at[1]), &rows);
    context_.kernels.prepare_row(down_, x_bf16_, x, rows, entry - a.first);
  }

  void outer(const Areas& area, int64_t slice, Scratch& mine) const {
    const int64_t units = down_.units() / experts_, n = n_;
    grouped_.each_run(slice, units, [&](const Active& a, int64_t unit, int64_t count) {
      const Weight w = matrix_of(down_, a.matrix, units, n);
      LinearArgs args{&w, {}, x_bf16_, floats_at(area.out) + a.first * n, n, down_bias_ ? down_bias_ + a.matrix * n : nullptr,
                      nullptr, 0, 1.0f, Act::None};
      lay_rows(w, x_bf16_, a.rows, at(area.rounded + a.at[1]), &args.x);
      products(args, a.rows, unit, count, mine);
    });
  }

  void products(const LinearArgs& args, int64_t rows, int64_t unit, int64_t count, Scratch& mine) const {
    for (int64_t r = 0; r < rows; r += kRows)
      context_.kernels.linear_units(args, r, std::min<int64_t>(kRows, rows - r), unit, count, mine.floats);
  }

  void combine(const Areas& area, int64_t t) const {
    if (slots_) return fill_slots(area, t);
    const int64_t n = n_;
    const float* rows[kMaxTop];
    float weights[kMaxTop];
    int64_t here = 0;
    for (int64_t j = 0; j < top_; j++) {
      const int64_t entry = grouped_.entry(t, j);
      if (entry < 0) continue;
      rows[here] = floats_at(area.out) + entry * n;
      weights[here++] = scale_input_ ? 1.0f : weights_.row(t)[j];
    }
    const float* residual = residual_ ? residual_->row(t) : nullptr;
    float* out = out_.row(t);
    if (here) return context_.kernels.combine_row(rows, weights, here, residual, out, n);
    for (int64_t i = 0; i < n; i++) out[i] = residual ? residual[i] : 0.0f;
  }

  // Writes the results of token t without adding them: slot j has that of its expert j, the last one the residual.
  void fill_slots(const Areas& area, int64_t t) const {
    float* out = out_.row(t);
    for (int64_t j = 0; j < slots_; j++, out += n_) {
      const int64_t entry = j < top_ ? grouped_.entry(t, j) : -1;
      if (entry >= 0) {
        const float* y = floats_at(area.out) + entry * n_;
        const float weight = scale_input_ ? 1.0f : weights_.row(t)[j];
        for (int64_t i = 0; i < n_; i++) out[i] = y[i] * weight;
      } else if (j == top_ && residual_) {
        std::copy_n(residual_->row(t), n_, out);
      } else {
        std::fill_n(out, n_, 0.0f);
      }
    }
  }

  struct Turn {  // the matrix of an expert, -1 if this rank has none; the rank computes it for tokens t with t % copies == copy
    int64_t matrix = -1, copy = 0, copies = 1;
  };
  const Context& context_;
  const Tensor &x_, &weights_, &ids_, &out_, *residual_;
  const Weight &up_, &down_;
  const float *up_bias_, *down_bias_, *order_, *down_order_;
  int64_t experts_, inner_, top_, slots_, n_, first_;
  std::vector<Turn> turns_;  // by expert of the model
  std::vector<int64_t> tokens_;  // routed to each expert of the model so far
  bool x_bf16_, scale_input_;
  Act activation_;
  float alpha_, limit_, shift_;
  Grouped grouped_;
};

const Registered<Route> route("route");
const Registered<Experts> experts("experts");

}  // namespace
}  // namespace intaglio
