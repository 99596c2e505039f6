// Mixtures of experts and products by head: tokens sorted by expert once, then two products over the experts that have
// any, cut into parts of equal work, then each token's sum. A token's result is one chain over its own experts, in their
// order, so neither its company nor the number of threads can change its bits.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "executable.h"

namespace intaglio {

namespace {
constexpr int kSlices = 16;  // parts a thread has of a product over experts
constexpr int64_t kCost = 8;  // rows that cost about as much as fetching the weights they meet

// The k values of x as the columns of an expert's matrix stand, in `room`; as they are where there are no orders. Orders
// are whole numbers below 2^24.
const float* in_order(const float* orders, int64_t expert, const float* x, int64_t k, float* room) {
  if (!orders) return x;
  for (int64_t i = 0; i < k; i++) room[i] = x[int64_t(orders[expert * k + i])];
  return room;
}
}  // namespace

// One matrix of a stack whose matrices begin at whole units.
Weight part_of(const Weight& w, int64_t i, int64_t units, int64_t rows) {
  Weight own = w;
  own.n = w.glu ? 2 * rows : rows;
  own.panels = w.glu ? 2 * units : units;
  own.data = w.data + i * units * w.unit_bytes();
  return own;
}

// tensors: logits, bias, weights, ids. ints: top, score, groups, kept, group_best, normalise. floats: scale, jitter.
RouteArgs Executable::route_args(const Op& op) const {
  const Tensor &logits = tensors_[size_t(op.tensors[0])], &weights = tensors_[size_t(op.tensors[2])], &ids = tensors_[size_t(op.tensors[3])];
  return {rows_at(op.tensors[0]), vector_at(op.tensors[1]), rows_at(op.tensors[2]), (int32_t*)rows_at(op.tensors[3]),
          logits.ld, weights.ld, ids.ld, logits.cols, op.ints[0], op.ints[2], op.ints[3], op.ints[4],
          RouteScore(op.ints[1]), op.ints[5] != 0, float(op.floats[0]), float(op.floats[1])};
}

// tensors: x, weights, ids, gate and up, down, their biases, the orders of their columns, residual, out.
// ints: experts, inner, x is bf16, activation, weights scale x, number of the first expert. floats: alpha, limit, shift.
ExpertsView Executable::experts_view(const Op& op) const {
  const Weight &up = tensors_[size_t(op.tensors[3])].weight->w, &down = tensors_[size_t(op.tensors[4])].weight->w;
  return {&up, &down, op.ints[0], op.ints[1], tensors_[size_t(op.tensors[10])].cols, up.units() / op.ints[0], down.units() / op.ints[0],
          tensors_[size_t(op.tensors[2])].cols, op.ints[2] != 0};
}

void Executable::plan_experts(const Op& op) {
  const ExpertsView v = experts_view(op);
  const int64_t entries = in_.t * v.top, most = std::min(v.experts, entries);
  Sorted& s = sorted_;
  auto room = [&](const Weight& w) { return entries * lay_rows(w, v.x_bf16, 1, nullptr, nullptr) + most * lay_rows(w, v.x_bf16, 1, nullptr, nullptr); };
  grow(s.x, room(*v.up)), grow(s.rounded, room(*v.down));
  grow(s.inner, entries * v.inner * 4), grow(s.out, entries * v.n * 4 + 64);
  s.start.resize(std::max(s.start.size(), size_t(v.experts) + 1));
  for (auto* list : {&s.entry, &s.token}) list->resize(std::max(list->size(), size_t(entries)));
}

void Executable::add_experts(int at, const Op& op) {
  const int64_t entries = in_.t * experts_view(op).top, threads = team_.size(), few = std::max<int64_t>(1, entries / (4 * threads));
  if (!team_.append(at)) team_.add(at, 0, 1, 1);
  team_.add(at, 1, entries, few);
  team_.add(at, 2, kSlices * threads, 1);
  team_.add(at, 3, entries, few);
  team_.add(at, 4, kSlices * threads, 1);
  team_.add(at, 5, in_.t, std::max<int64_t>(1, in_.t / (4 * threads)));
}

// Entries (token, j) in the order of their experts, tokens ascending within one; -1 where the expert is another rank's.
void Executable::sort_tokens(const Op& op) {
  const ExpertsView v = experts_view(op);
  const Tensor& ids = tensors_[size_t(op.tensors[2])];
  auto id = [&](int64_t t, int64_t j) {
    const int64_t e = ((const int32_t*)rows_at(op.tensors[2]))[t * ids.ld + j] - op.ints[5];
    return e < 0 || e >= v.experts ? -1 : int32_t(e);
  };
  Sorted& s = sorted_;
  std::fill(s.start.begin(), s.start.end(), 0);
  for (int64_t t = 0; t < in_.t; t++)
    for (int64_t j = 0; j < v.top; j++)
      if (id(t, j) >= 0) s.start[size_t(id(t, j)) + 1]++;
  for (int64_t e = 0; e < v.experts; e++) s.start[size_t(e) + 1] += s.start[size_t(e)];
  std::vector<int32_t> next(s.start.begin(), s.start.end());
  for (int64_t t = 0; t < in_.t; t++)
    for (int64_t j = 0; j < v.top; j++) {
      const int32_t e = id(t, j), at = e < 0 ? -1 : next[size_t(e)]++;
      s.entry[size_t(t * v.top + j)] = at;
      if (e >= 0) s.token[size_t(at)] = int32_t(t * v.top + j);
    }
  s.active.clear();
  int64_t x = 0, rounded = 0, cost = 0;
  for (int64_t e = 0; e < v.experts; e++) {
    const int64_t rows = s.start[size_t(e) + 1] - s.start[size_t(e)];
    if (!rows) continue;
    const int64_t own = (rows + kCost - 1) / kCost;
    s.active.push_back({e, s.start[size_t(e)], rows, x, rounded, cost, own});
    x += lay_rows(*v.up, v.x_bf16, rows, nullptr, nullptr), rounded += lay_rows(*v.down, v.x_bf16, rows, nullptr, nullptr);
    cost += own;
  }
  s.cost = cost;
}

const Executable::Active& Executable::active_of(int64_t entry) const {
  auto later = std::upper_bound(sorted_.active.begin(), sorted_.active.end(), entry, [](int64_t at, const Active& a) { return at < a.first; });
  return *(later - 1);
}

// Calls f(active expert, unit) for the units that fall to a slice.
template <class Fn>
void Executable::each_unit(int64_t slice, int64_t units, Fn f) const {
  const int64_t slices = int64_t(kSlices) * team_.size(), total = sorted_.cost * units;
  const int64_t low = total * slice / slices, high = total * (slice + 1) / slices;
  for (const Active& a : sorted_.active) {
    const int64_t base = a.before * units;
    auto from = [&](int64_t cost) { return std::clamp<int64_t>((cost - base + a.cost - 1) / a.cost, 0, units); };
    if (base + units * a.cost <= low || base >= high) continue;
    for (int64_t u = low <= base ? 0 : from(low); u < from(high); u++) f(a, u);
  }
}

void Executable::run_experts(Scratch& mine, const Op& op, int part, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) switch (part) {
      case 0: sort_tokens(op); break;
      case 1: expert_row(mine, op, i); break;
      case 2: expert_inner(mine, op, i); break;
      case 3: round_inner(mine, op, i); break;
      case 4: expert_outer(mine, op, i); break;
      case 5: combine(op, i); break;
    }
}

// One entry's x, as its expert's first product reads it.
void Executable::expert_row(Scratch& mine, const Op& op, int64_t entry) {
  const ExpertsView v = experts_view(op);
  if (entry >= sorted_.start[size_t(v.experts)]) return;  // fewer are here than there was room for
  const Active& a = active_of(entry);
  const int64_t t = sorted_.token[size_t(entry)] / v.top, j = sorted_.token[size_t(entry)] % v.top;
  const float* x = rows_at(op.tensors[0]) + t * tensors_[size_t(op.tensors[0])].ld;
  x = in_order(vector_at(op.tensors[7]), a.expert, x, v.up->k, mine.floats);
  if (op.ints[4]) {
    const float weight = rows_at(op.tensors[1])[t * tensors_[size_t(op.tensors[1])].ld + j];
    for (int64_t i = 0; i < v.up->k; i++) mine.floats[i] = x[i] * weight;
    x = mine.floats;
  }
  Rows rows;
  lay_rows(*v.up, v.x_bf16, a.rows, sorted_.x.data() + a.x, &rows);
  kernels_->prepare_row(*v.up, v.x_bf16, x, rows, entry - a.first);
}

void Executable::expert_inner(Scratch& mine, const Op& op, int64_t slice) {
  const ExpertsView v = experts_view(op);
  const float* bias = vector_at(op.tensors[5]);
  each_unit(slice, v.up_units, [&](const Active& a, int64_t unit) {
    const Weight w = part_of(*v.up, a.expert, v.up_units, v.inner);
    LinearArgs args{&w, {}, v.x_bf16, (float*)sorted_.inner.data() + a.first * v.inner, v.inner, bias ? bias + a.expert * 2 * v.inner : nullptr,
                    nullptr, 0, 1.0f, Act(op.ints[3]), float(op.floats[0]), float(op.floats[1]), float(op.floats[2])};
    lay_rows(w, v.x_bf16, a.rows, sorted_.x.data() + a.x, &args.x);
    for (int64_t r = 0; r < a.rows; r += kRows) kernels_->linear_unit(args, r, std::min<int64_t>(kRows, a.rows - r), unit, mine.floats);
  });
}

void Executable::round_inner(Scratch& mine, const Op& op, int64_t entry) {
  const ExpertsView v = experts_view(op);
  if (entry >= sorted_.start[size_t(v.experts)]) return;
  const Active& a = active_of(entry);
  Rows rows;
  lay_rows(*v.down, v.x_bf16, a.rows, sorted_.rounded.data() + a.rounded, &rows);
  const float* x = in_order(vector_at(op.tensors[8]), a.expert, (const float*)sorted_.inner.data() + entry * v.inner, v.inner, mine.floats);
  kernels_->prepare_row(*v.down, v.x_bf16, x, rows, entry - a.first);
}

void Executable::expert_outer(Scratch& mine, const Op& op, int64_t slice) {
  const ExpertsView v = experts_view(op);
  const float* bias = vector_at(op.tensors[6]);
  each_unit(slice, v.down_units, [&](const Active& a, int64_t unit) {
    const Weight w = part_of(*v.down, a.expert, v.down_units, v.n);
    LinearArgs args{&w, {}, v.x_bf16, (float*)sorted_.out.data() + a.first * v.n, v.n, bias ? bias + a.expert * v.n : nullptr,
                    nullptr, 0, 1.0f, Act::None};
    lay_rows(w, v.x_bf16, a.rows, sorted_.rounded.data() + a.rounded, &args.x);
    for (int64_t r = 0; r < a.rows; r += kRows) kernels_->linear_unit(args, r, std::min<int64_t>(kRows, a.rows - r), unit, mine.floats);
  });
}

void Executable::combine(const Op& op, int64_t t) {
  const ExpertsView v = experts_view(op);
  const float* rows[kMaxTop];
  float weights[kMaxTop];
  int64_t here = 0;
  for (int64_t j = 0; j < v.top; j++) {
    const int64_t entry = sorted_.entry[size_t(t * v.top + j)];
    if (entry < 0) continue;
    rows[here] = (const float*)sorted_.out.data() + entry * v.n;
    weights[here++] = op.ints[4] ? 1.0f : rows_at(op.tensors[1])[t * tensors_[size_t(op.tensors[1])].ld + j];
  }
  const float* residual = rows_at(op.tensors[9]);
  if (residual) residual += t * tensors_[size_t(op.tensors[9])].ld;
  float* out = rows_at(op.tensors[10]) + t * tensors_[size_t(op.tensors[10])].ld;
  if (here) return kernels_->combine_row(rows, weights, here, residual, out, v.n);
  for (int64_t i = 0; i < v.n; i++) out[i] = residual ? residual[i] : 0.0f;
}

// tensors: x, w, out. ints: heads, rows of a head's matrix. Rows are prepared by head, [head][token].
void Executable::run_heads(Scratch& mine, const Op& op, int part, int64_t begin, int64_t end) {
  const Weight& w = tensors_[size_t(op.tensors[1])].weight->w;
  const Tensor &x = tensors_[size_t(op.tensors[0])], &out = tensors_[size_t(op.tensors[2])];
  const int64_t heads = op.ints[0], n = op.ints[1], width = x.cols / heads, rest = width - w.k, units = w.units() / heads;
  const int64_t stride = lay_rows(w, false, in_.t, nullptr, nullptr), blocks = (in_.t + kRows - 1) / kRows;
  for (int64_t i = begin; i < end; i++) {
    if (part == 0) {
      const int64_t t = i / heads, h = i % heads;
      const float* from = rows_at(op.tensors[0]) + t * x.ld + h * width;
      Rows rows;
      lay_rows(w, false, in_.t, prepared_.data() + h * stride, &rows);
      kernels_->prepare_row(w, false, from, rows, t);
      std::memcpy(rows_at(op.tensors[2]) + t * out.ld + h * (n + rest) + n, from + w.k, size_t(rest) * 4);
      continue;
    }
    const int64_t h = i / (units * blocks), first = i / units % blocks * kRows;
    const Weight own = part_of(w, h, units, n);
    LinearArgs a{&own, {}, false, rows_at(op.tensors[2]) + h * (n + rest), out.ld, nullptr, nullptr, 0, 1.0f, Act::None};
    lay_rows(w, false, in_.t, prepared_.data() + h * stride, &a.x);
    kernels_->linear_unit(a, first, std::min<int64_t>(kRows, in_.t - first), i % units, mine.floats);
  }
}

void Executable::add_heads(int at, const Op& op) {
  const Weight& w = tensors_[size_t(op.tensors[1])].weight->w;
  const int64_t rows = in_.t * op.ints[0], tasks = w.units() * ((in_.t + kRows - 1) / kRows), threads = team_.size();
  team_.add(at, 0, rows, std::max<int64_t>(1, rows / (4 * threads)));
  team_.add(at, 1, tasks, std::max<int64_t>(1, tasks / (16 * threads)));
}

}  // namespace intaglio
