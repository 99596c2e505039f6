// Ops on the K/V cache: kv_write stores keys and values, attend computes attention over them.
#include <cmath>
#include <cstring>

#include "ops/sequences.h"
#include "run/op.h"

namespace intaglio {
namespace {

// The scales of the cache of an op's operand, one for each head: 1 where the op has none.
std::vector<float> head_scales(OpArgs& a, const char* operand, const Cache& c) {
  const float* given = a.optional_vector(operand);
  return given ? std::vector<float>(given, given + c.heads) : std::vector<float>(size_t(c.heads), 1.0f);
}

int padded_head(int head_dim) { return (head_dim + 15) / 16 * 16; }

// Writes keys to columns of a page ([head_dim][page]) and values to rows ([page][v_stride]).
class KvWrite : public OpKernel {
 public:
  explicit KvWrite(OpArgs& a)
      : context_(a.context), rows_{&a.rows("k"), &a.rows("v")}, caches_{&a.cache("k_cache"), &a.cache("v_cache")},
        scales_{head_scales(a, "k_scale", *caches_[0]), head_scales(a, "v_scale", *caches_[1])} {
    for (const Cache* c : caches_)
      if (c->head_dim > kMaxHead) throw std::invalid_argument("a head of " + std::to_string(c->head_dim) + " values; the host supports heads of up to 1024");
  }
  void plan(Planner& p) override { p.rows(p.in().t, rows_[0]->cols); }
  void run(int, int64_t begin, int64_t end, Scratch&) override {
    for (int64_t t = begin; t < end; t++)
      for (size_t which = 0; which < (caches_[0] == caches_[1] ? 1 : 2); which++) write(t, *rows_[which], *caches_[which], scales_[which]);
  }

 private:
  void write(int64_t t, const Tensor& x, const Cache& c, const std::vector<float>& scales) const {
    const int32_t slot = (c.windowed ? context_.in.window_slots : context_.in.slots)[t];
    const int64_t tokens = context_.page, page = slot / tokens, at = slot % tokens;
    const int64_t width = c.keys ? c.head_dim : c.stride, first = c.keys ? at : at * width, step = c.keys ? tokens : 1;
    for (int64_t h = 0; h < c.heads; h++) {
      const float* from = x.row(t) + h * c.head_dim;
      uint8_t* to = c.memory.data() + (page * c.heads + h) * block_bytes(c.format, width, tokens);
      auto put = [&](auto* values, const auto* x, auto convert) {
        for (int64_t d = 0; d < c.head_dim; d++) values[first + d * step] = convert(x[d]);
      };
      if (c.format == Fmt::F32) {
        put((float*)to, from, [](float f) { return f; });
      } else if (c.format == Fmt::BF16) {
        put((uint16_t*)to, from, to_bf16);
      } else if (c.format == Fmt::FP8) {
        uint8_t codes[kMaxHead];
        encode_e4m3(from, c.head_dim, scales[size_t(h)], codes);
        put(to, codes, [](uint8_t code) { return code; });
      } else {
        int8_t codes[kMaxHead];
        ((uint16_t*)(to + width * tokens))[at] = encode_row(from, c.head_dim, codes);
        put((int8_t*)to, codes, [](int8_t code) { return code; });
      }
    }
  }

  const Context& context_;
  const Tensor* rows_[2];
  const Cache* caches_[2];
  const std::vector<float> scales_[2];  // of FP8 caches
};

// A task of attention: some tokens of one sequence, for one K/V head, over one split of their keys or over all of them.
struct Task {
  int seq, token, tokens, kv_head, split;  // split: counted from the first visible one; -1: all splits, result stored at once
  int64_t partial;                         // offset in floats into the workspace, for the result of a split
};
struct Merge {
  int seq, kv_head, splits;
  int64_t partial;
};
struct Tasks {
  std::vector<Task> tasks;
  std::vector<Merge> merges;
  int64_t partials = 0;  // floats
};

// The tasks of attention of one shape. A sequence whose queries fit one task gets one task for each split (flash decoding), so
// that a single long context occupies all threads; other sequences get tasks of some queries each. In both cases the same
// splits are merged in the same order, so the result is the same bit for bit.
class AttentionTasks : public Shared {
 public:
  AttentionTasks(int kv_heads, int share, int v_stride, VisibleKeys reach)
      : kv_heads(kv_heads), share(share), v_stride(v_stride), reach(reach) {}
  bool same_as(const Shared& other) const override {
    auto& o = static_cast<const AttentionTasks&>(other);
    return o.kv_heads == kv_heads && o.share == share && o.v_stride == v_stride && o.reach == reach;
  }
  // Adds each sequence's query count and, if it is divided by splits, their number: a growing context needs a new plan once
  // every 512 positions.
  void add_key(const StepInputs& in, std::vector<int64_t>& key) const override {
    for (int64_t s = 0; s < in.s; s++) key.push_back(int64_t(in.q_len[s]) << 32 | (by_splits(in, s) ? splits(in, s) : 0));
  }
  std::any plan(Planner& p) override {
    const StepInputs& in = p.in();
    Tasks out;
    for (int s = 0; s < int(in.s); s++) {
      const int n = in.q_len[s], count = splits(in, s);
      const bool whole = !by_splits(in, s) || count == 1;
      for (int token = 0; token < n; token += most()) {
        const int tokens = std::min(most(), n - token);
        for (int h = 0; h < kv_heads; h++) {
          if (whole) {
            out.tasks.push_back({s, token, tokens, h, -1, 0});
            continue;
          }
          out.merges.push_back({s, h, count, out.partials});
          for (int split = 0; split < count; split++, out.partials += int64_t(tokens) * share * (v_stride + 2))
            out.tasks.push_back({s, token, tokens, h, split, out.partials});
        }
      }
    }
    return out;
  }

  // Largest number of tokens in a task.
  int most() const { return std::max(1, kTaskRows / share); }
  int first_split(int64_t position) const { return int(reach.first(position)) / kSplit; }
  static int end_split(int64_t position, int tokens) { return int((position + tokens + kSplit - 1) / kSplit); }

  const int kv_heads, share, v_stride;
  const VisibleKeys reach;

 private:
  bool by_splits(const StepInputs& in, int64_t s) const { return in.q_len[s] <= most(); }
  int splits(const StepInputs& in, int64_t s) const {
    const int64_t position = in.context_len[s] - in.q_len[s];
    return end_split(position, in.q_len[s]) - first_split(position);
  }
};

// State of the online softmax of some rows: maximum, sum of weights, weighted values.
struct SoftmaxState {
  float *top, *total, *acc;
  SoftmaxState(float* at, int64_t rows) : top(at), total(at + rows), acc(at + 2 * rows) {}
  void clear(int64_t rows, int64_t width) const {
    std::fill(top, top + rows, -INFINITY);
    std::fill(total, acc + rows * width, 0.0f);
  }
};

class Attend : public OpKernel {
 public:
  enum Part { Splits, Merges };
  explicit Attend(OpArgs& a)
      : context_(a.context), q_(a.rows("q")), out_(a.rows("out")), k_(a.cache("k_cache")), v_(a.cache("v_cache")),
        rope_(a.optional_cache("rope_cache")), sinks_(a.optional_vector("sinks")), slopes_(a.optional_vector("slopes")),
        k_scale_(head_scales(a, "k_scale", k_)), v_scale_(head_scales(a, "v_scale", v_)), heads_(int(a.integer("heads"))),
        scale_(a.number("scale")), softcap_(a.number("softcap")), temper_(a.number("temper")),
        temper_every_(a.number("temper_every")), temper_from_(int(a.integer("temper_from"))), chosen_(a.optional_rows("chosen")),
        tasks_(shared_tasks(a)) {}

  void plan(Planner& p) override {
    const Tasks& t = p.plan().of<Tasks>(tasks_);
    p.workspace(t.partials * 4);
    p.floats(gathered() + int64_t(std::max(kTaskRows, tasks_.share)) * (kSplit + 2 * tasks_.v_stride + 4));
    p.phase(Splits, int64_t(t.tasks.size()), 1);
    p.phase(Merges, int64_t(t.merges.size()), 1);
  }

  void run(int part, int64_t begin, int64_t end, Scratch& mine) override {
    const Tasks& t = context_.plan->of<Tasks>(tasks_);
    const bool latent = &k_ == &v_;
    const AttendArgs a{q_.row(0), out_.row(0), q_.ld, out_.ld, heads_, tasks_.kv_heads, k_.head_dim, v_.head_dim, tasks_.v_stride,
                       context_.page, tasks_.reach, scale_, softcap_, k_.format, k_.memory.data(),
                       latent ? nullptr : v_.memory.data(), rope_ ? rope_->memory.data() : nullptr, rope_ ? rope_->head_dim : 0,
                       latent, k_.heads == 1, sinks_, slopes_, temper_, temper_every_, temper_from_, k_scale_.data(), v_scale_.data(),
                       chosen_ ? chosen_->integers(0) : nullptr, chosen_ ? chosen_->ld : 0, chosen_ ? chosen_->cols : 0,
                       chosen_ ? mine.floats : nullptr};
    for (int64_t i = begin; i < end; i++)
      if (part == Merges) merge(a, t.merges[size_t(i)], mine);
      else if (t.tasks[size_t(i)].split < 0) attend_whole(a, t.tasks[size_t(i)], mine);
      else attend_split(a, t.tasks[size_t(i)], mine);
  }

 private:
  AttentionTasks& shared_tasks(OpArgs& a) const {
    int share = heads_ / k_.heads;
    if (k_.heads == 1)  // one K/V head (MQA, MLA): divide the query heads into tasks of about kTaskRows
      for (share = std::min(share, kTaskRows); heads_ % share; share--) {}
    if (share > kMaxTaskRows) throw std::invalid_argument(std::to_string(share) + " query heads share one K/V head; the host supports up to 256");
    const VisibleKeys reach{int(a.integer("window")), int(a.integer("chunk"))};
    return a.share<AttentionTasks>(heads_ / share, share, v_.keys ? padded_head(v_.head_dim) : v_.stride, reach);
  }
  Query query(int seq, int token, int tokens, int kv_head) const {
    const StepInputs& in = context_.in;
    return {blocks_of(in, k_, seq), in.first_row[seq] + token, in.context_len[seq] - in.q_len[seq] + token, tokens, kv_head};
  }
  // Floats at the start of a thread's scratch space for AttendArgs::gathered.
  int64_t gathered() const {
    return chosen_ ? gathered_floats(k_.format, k_.head_dim + (rope_ ? rope_->head_dim : 0), tasks_.v_stride, tasks_.share) : 0;
  }
  float* partial(int64_t at) const { return reinterpret_cast<float*>(context_.workspace) + at; }

  void attend_split(const AttendArgs& a, const Task& t, Scratch& mine) const {
    const Query q = query(t.seq, t.token, t.tokens, t.kv_head);
    const SoftmaxState one(partial(t.partial), int64_t(t.tokens) * tasks_.share);
    context_.kernels.attend_split(a, q, tasks_.first_split(q.position) + t.split, mine.floats + gathered(), one.top, one.total, one.acc);
  }
  void attend_whole(const AttendArgs& a, const Task& t, Scratch& mine) const {
    const Query q = query(t.seq, t.token, t.tokens, t.kv_head);
    const int64_t rows = int64_t(t.tokens) * tasks_.share, size = rows * (a.v_stride + 2);
    const SoftmaxState all(mine.floats + gathered() + rows * kSplit, rows), one(mine.floats + gathered() + rows * kSplit + size, rows);
    all.clear(rows, a.v_stride);
    for (int split = tasks_.first_split(q.position); split < tasks_.end_split(q.position, t.tokens); split++) {
      context_.kernels.attend_split(a, q, split, mine.floats + gathered(), one.top, one.total, one.acc);
      context_.kernels.attend_merge(rows, a.v_stride, all.top, all.total, all.acc, one.top, one.total, one.acc);
    }
    finish(a, q, all);
  }
  void merge(const AttendArgs& a, const Merge& m, Scratch& mine) const {
    const int tokens = context_.in.q_len[m.seq];
    const int64_t rows = int64_t(tokens) * tasks_.share;
    const SoftmaxState all(mine.floats, rows);
    all.clear(rows, a.v_stride);
    for (int s = 0; s < m.splits; s++) {
      const SoftmaxState one(partial(m.partial + s * rows * (a.v_stride + 2)), rows);
      context_.kernels.attend_merge(rows, a.v_stride, all.top, all.total, all.acc, one.top, one.total, one.acc);
    }
    finish(a, query(m.seq, 0, tokens, m.kv_head), all);
  }
  static void finish(const AttendArgs& a, const Query& q, const SoftmaxState& all) {
    const int64_t share = a.heads / a.kv_heads;
    const float scale = a.format == Fmt::FP8 ? a.v_scale[a.one_head ? 0 : q.kv_head] : 1.0f;
    for (int64_t r = 0; r < q.tokens * share; r++) {
      float* out = a.out + (q.first_row + r / share) * a.ld_out + (q.kv_head * share + r % share) * a.v_dim;
      float weight = 1, whole = all.total[r];
      if (a.sinks) {  // a sink counts as one more key, whose value is 0
        const float sink = a.sinks[q.kv_head * share + r % share], most = std::max(all.top[r], sink);
        weight = std::exp(all.top[r] - most), whole = whole * weight + std::exp(sink - most);
      }
      for (int64_t d = 0; d < a.v_dim; d++) out[d] = all.acc[r * a.v_stride + d] * weight / whole * scale;
    }
  }

  const Context& context_;
  const Tensor &q_, &out_;
  const Cache &k_, &v_, *rope_;
  const float *sinks_, *slopes_;
  std::vector<float> k_scale_, v_scale_;  // of FP8 caches
  int heads_;
  float scale_, softcap_, temper_, temper_every_;
  int temper_from_;
  const Tensor* chosen_;
  AttentionTasks& tasks_;
};

const Registered<KvWrite> kv_write("kv_write");
const Registered<Attend> attend("attend");

}  // namespace
}  // namespace intaglio
