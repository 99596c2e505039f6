// Ops of compressed attention (DeepSeek-V4): pool_keys pools runs of tokens into entries of a cache, attend_pooled computes
// attention over a window of keys and over entries.
#include <algorithm>
#include <cmath>

#include "ops/sequences.h"
#include "run/op.h"

namespace intaglio {
namespace {

// Address of row `row` of one head of a page, in a cache whose rows are contiguous.
const uint8_t* row_at(const Cache& c, int64_t page, int64_t head, int64_t row) {
  return c.memory.data() + (page * c.heads + head) * c.head_bytes() + row * c.stride * cache_bytes(c.format);
}

// A task for each token; only the last tokens of runs have work.
class PoolKeys : public OpKernel {
 public:
  explicit PoolKeys(OpArgs& a)
      : context_(a.context), values_(a.cache("value_cache")), gates_(a.cache("gate_cache")), entries_(a.cache("entries")), weight_(a.vector("weight")),
        frequencies_(a.vector("frequencies")), every_(a.integer("every")), halves_(a.flag("overlap") ? 2 : 1),
        eps_(a.number("eps")), factor_(a.number("factor")), bias_(size_t(every_ * halves_ * values_.stride)) {
    const std::vector<float>& bias = a.vector("bias");
    for (int64_t i = 0; i < every_ * halves_; i++)
      std::copy_n(bias.data() + i * values_.head_dim, values_.head_dim, bias_.data() + i * values_.stride);
  }
  void plan(Planner& p) override {
    p.floats(values_.stride);
    p.phase(0, p.in().t, 1);
  }
  void run(int, int64_t begin, int64_t end, Scratch& mine) override {
    for (int64_t t = begin; t < end; t++)
      if ((context_.in.positions[t] + 1) % every_ == 0) pool(t, mine.floats);
  }

 private:
  void pool(int64_t t, float* out) const {
    const StepInputs& in = context_.in;
    const int64_t page = context_.page, at = in.positions[t], first = std::max<int64_t>(0, at + 1 - halves_ * every_);
    const int32_t* blocks = blocks_of(in, values_, sequence_of(in, t));
    std::vector<PooledRow> rows;
    for (int64_t p = first; p <= at; p++) {
      const int64_t half = p > at - every_ ? halves_ - 1 : 0, block = blocks[p / page];
      rows.push_back({row_at(values_, block, half, p % page), row_at(gates_, block, half, p % page),
                      bias_.data() + (p % every_ * halves_ + half) * values_.stride});
    }
    context_.kernels.pool_rows(rows.data(), int64_t(rows.size()), values_.stride, values_.format, out);
    const int64_t width = values_.head_dim, pairs = int64_t(frequencies_.size());
    double squares = 0;
    for (int64_t d = 0; d < width; d++) squares += double(out[d]) * out[d];
    const float scale = float(1 / std::sqrt(squares / double(width) + eps_));
    for (int64_t d = 0; d < width; d++) out[d] *= scale * weight_[size_t(d)];
    float* turned = out + width - 2 * pairs;
    for (int64_t i = 0; i < pairs; i++) {
      const double angle = float(at + 1 - every_) * frequencies_[size_t(i)];
      const float cos = float(std::cos(angle) * factor_), sin = float(std::sin(angle) * factor_), a = turned[2 * i], b = turned[2 * i + 1];
      turned[2 * i] = a * cos - b * sin, turned[2 * i + 1] = b * cos + a * sin;
    }
    put(in.slots[t] / page, at % page / every_, out);
  }
  void put(int64_t page, int64_t row, const float* x) const {
    const Cache& c = entries_;
    uint8_t* to = c.memory.data() + page * c.head_bytes();
    const int64_t first = c.keys ? row : row * c.stride, step = c.keys ? c.rows : 1;
    for (int64_t d = 0; d < c.head_dim; d++)
      if (c.format == Fmt::BF16) ((uint16_t*)to)[first + d * step] = to_bf16(x[d]);
      else ((float*)to)[first + d * step] = x[d];
  }

  const Context& context_;
  const Cache &values_, &gates_, &entries_;
  const std::vector<float>&weight_, &frequencies_;
  int64_t every_, halves_;
  float eps_, factor_;
  std::vector<float> bias_;  // [every][halves][stride], zeros beyond head_dim
};

// A task for each token and some of its heads.
class AttendPooled : public OpKernel {
 public:
  static constexpr int kHeads = 8;
  explicit AttendPooled(OpArgs& a)
      : context_(a.context), q_(a.rows("q")), out_(a.rows("out")), cache_(a.cache("cache")), entries_(a.cache("entries")),
        sinks_(a.optional_vector("sinks")), chosen_(a.optional_rows("chosen")), heads_(a.integer("heads")),
        window_(a.integer("window")), every_(a.integer("every")), groups_((heads_ + kHeads - 1) / kHeads), scale_(a.number("scale")) {
    if (cache_.keys || entries_.keys) throw std::invalid_argument("attend_pooled reads caches that no op reads as transposed keys");
  }
  void plan(Planner& p) override {
    p.floats(2 * kHeads * cache_.stride);
    p.phase(0, p.in().t * groups_, 1);
  }
  void run(int, int64_t begin, int64_t end, Scratch& mine) override {
    std::vector<const void*> keys;
    std::vector<float> scores;  // as long as the context, which a plan does not know
    for (int64_t i = begin; i < end; i++) {
      const int64_t t = i / groups_, first = i % groups_ * kHeads;
      if (i == begin || first == 0) list(t, keys);
      attend(t, first, std::min<int64_t>(kHeads, heads_ - first), keys, scores, mine.floats);
    }
  }

 private:
  // The rows that token t attends to: keys of its window, then entries, both in ascending order.
  void list(int64_t t, std::vector<const void*>& keys) const {
    const StepInputs& in = context_.in;
    const int64_t page = context_.page, at = in.positions[t], s = sequence_of(in, t), seen = (at + 1) / every_;
    const int32_t *near = blocks_of(in, cache_, s), *far = blocks_of(in, entries_, s);
    keys.clear();
    for (int64_t p = std::max<int64_t>(0, at - window_ + 1); p <= at; p++) keys.push_back(row_at(cache_, near[p / page], 0, p % page));
    auto add = [&](int64_t entry) {
      const int64_t last = (entry + 1) * every_ - 1;
      keys.push_back(row_at(entries_, far[last / page], 0, last % page / every_));
    };
    for (int64_t i = 0; i < (chosen_ ? chosen_->cols : seen); i++)
      if (!chosen_) add(i);
      else if (chosen_->integers(t)[i] >= 0) add(chosen_->integers(t)[i]);
  }
  void attend(int64_t t, int64_t first, int64_t count, const std::vector<const void*>& keys, std::vector<float>& scores, float* mine) const {
    const int64_t width = cache_.head_dim, stride = cache_.stride, n = int64_t(keys.size());
    float *q = mine, *out = mine + kHeads * stride;
    std::fill(q, out, 0.0f);
    for (int64_t h = 0; h < count; h++) std::copy_n(q_.row(t) + (first + h) * width, width, q + h * stride);
    scores.resize(size_t(kHeads * ((n + 15) / 16 * 16)));
    const ListArgs a{q, out, int(count), int(stride), cache_.format, scale_, sinks_ ? sinks_ + first : nullptr};
    context_.kernels.attend_list(a, keys.data(), n, scores.data());
    for (int64_t h = 0; h < count; h++) std::copy_n(out + h * stride, width, out_.row(t) + (first + h) * width);
  }

  const Context& context_;
  const Tensor &q_, &out_;
  const Cache &cache_, &entries_;
  const float* sinks_;
  const Tensor* chosen_;
  int64_t heads_, window_, every_, groups_;
  float scale_;
};

const Registered<PoolKeys> pool_keys("pool_keys");
const Registered<AttendPooled> attend_pooled("attend_pooled");

}  // namespace
}  // namespace intaglio
