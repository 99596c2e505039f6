#include "executable.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace intaglio {

namespace {

constexpr int64_t kAlign = 64;
constexpr int64_t kPrivate = 16384;  // values of x that each thread rounds for itself rather than wait for the others

int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

void grow(Memory& m, int64_t bytes) {
  if (m.size() < bytes) m = Memory(bytes + bytes / 4);
}

uint16_t to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return uint16_t((u >> 16) | 0x40);
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

bool coded(const Weight& w) { return w.fmt == Fmt::I8 || w.fmt == Fmt::I4; }

// Lays out `rows` prepared rows at `at`; returns the bytes they take.
int64_t lay_rows(const Weight& w, bool x_bf16, int64_t rows, uint8_t* at, Rows* out) {
  int64_t each = coded(w) ? 1 : x_bf16 && w.fmt == Fmt::BF16 ? 2 : 4;
  int64_t groups = coded(w) ? w.padded_k / w.group : 0, values = aligned(rows * w.padded_k * each);
  if (out) *out = {at, (float*)(at + values), (int32_t*)(at + values + aligned(rows * groups * 4)), w.padded_k, groups};
  return values + 2 * aligned(rows * groups * 4);
}

}  // namespace

PackedWeight::PackedWeight(Fmt fmt, int64_t n, int64_t k, int64_t group, bool glu)
    : w(weight_layout(fmt, n, k, group, glu)), memory(w.panels * w.panel_bytes) {
  w.data = memory.data();
}

void PackedWeight::fill(const void* rows, Source type, int64_t first, int64_t count, int threads) {
  if (first < 0 || count < 0 || first + count > w.n) throw std::invalid_argument("rows outside the weight");
  std::vector<std::thread> helpers;
  auto share = [&](int i) {
    pack_rows(w, rows, type, first, count, w.panels * i / threads, w.panels * (i + 1) / threads);
  };
  for (int i = 1; i < threads; i++) helpers.emplace_back(share, i);
  share(0);
  for (auto& t : helpers) t.join();
}

// What one thread knows: its number, its scratch memory, and which shared counter comes next.
struct Executable::Thread {
  int id, phase;
  float* scratch;
  uint8_t* x;
};

int Executable::add_buffer(int64_t row_bytes, Extent rows) {
  buffers_.push_back({row_bytes, rows, 0});
  return int(buffers_.size()) - 1;
}

int Executable::add_tensor(Tensor t) {
  tensors_.push_back(std::move(t));
  return int(tensors_.size()) - 1;
}

void Executable::add_op(Op op) {
  if (op.kind == Kind::Rope) {
    RopeTable table{op.tensors[1], float(op.floats[0]), {}, {}};
    auto same = [&](const RopeTable& t) { return t.frequencies == table.frequencies && t.factor == table.factor; };
    auto at = std::find_if(tables_.begin(), tables_.end(), same);
    op.table = int(at - tables_.begin());
    if (at == tables_.end()) tables_.push_back(table);
  }
  if (op.kind == Kind::Attend) {
    const Tensor &k = tensors_[size_t(op.tensors[1])], &v = tensors_[size_t(op.tensors[2])];
    AttendPlan plan{k.heads, int(op.ints[0]) / k.heads, v.stride, int(op.ints[1]), {}, {}, 0};
    if (plan.share > kMaxTaskRows) throw std::invalid_argument("more than 256 query heads share one kv head");
    auto same = [&](const AttendPlan& p) {
      return p.kv_heads == plan.kv_heads && p.share == plan.share && p.v_stride == plan.v_stride && p.window == plan.window;
    };
    auto at = std::find_if(plans_.begin(), plans_.end(), same);
    op.plan = int(at - plans_.begin());
    if (at == plans_.end()) plans_.push_back(plan);
  }
  ops_.push_back(std::move(op));
}

Tensor Executable::make_cache(int64_t pages, int heads, int head_dim, bool bf16, bool keys) const {
  Tensor t;
  t.heads = heads, t.head_dim = head_dim, t.bf16 = bf16;
  t.stride = keys ? page_ : (head_dim + 15) / 16 * 16;
  int64_t values = pages * heads * (keys ? int64_t(head_dim) * page_ : int64_t(page_) * t.stride);
  t.cache = std::make_unique<Memory>(values * (bf16 ? 2 : 4) + 64);
  return t;
}

int64_t Executable::rows_of(const Tensor& t) const {
  return buffers_[size_t(t.buffer)].rows == Extent::T ? in_.t : in_.r;
}

float* Executable::rows_at(int tensor) const {
  if (tensor < 0) return nullptr;
  const Tensor& t = tensors_[size_t(tensor)];
  return (float*)(arena_.data() + buffers_[size_t(t.buffer)].offset) + t.column;
}

const float* Executable::vector_at(int tensor) const {
  return tensor < 0 ? nullptr : tensors_[size_t(tensor)].vector.data();
}

// Sizes every piece of memory for this batch, and cuts attention into tasks.
void Executable::plan_step() {
  int64_t at = 0;
  for (Buffer& b : buffers_) {
    b.offset = at;
    at += aligned(b.row_bytes * (b.rows == Extent::T ? in_.t : in_.r)) + kAlign;
  }
  grow(arena_, at);
  int64_t shared = 0, partials = 0, attend = 0;
  private_x_ = 0;
  for (const Op& op : ops_)
    if (op.kind == Kind::Linear) {
      const Weight& w = tensors_[size_t(op.tensors[1])].weight->w;
      int64_t rows = rows_of(tensors_[size_t(op.tensors[4])]), bytes = lay_rows(w, op.ints[0], rows, nullptr, nullptr);
      int64_t& most = rows * w.padded_k <= kPrivate ? private_x_ : shared;
      most = std::max(most, bytes);
    }
  for (AttendPlan& p : plans_) {
    plan_attend(p);
    partials = std::max(partials, p.partials);
    attend = std::max<int64_t>(attend, std::max(kTaskRows, p.share) * (kSplit + 2 * p.v_stride + 4));
  }
  grow(prepared_, shared);
  grow(partials_, partials * 4);
  private_x_ = aligned(private_x_);
  scratch_stride_ = aligned(4 * std::max<int64_t>(kRows * kUnit, attend)) + private_x_;
  grow(scratch_, scratch_stride_ * team_.size());
  for (RopeTable& table : tables_) {
    size_t n = size_t(in_.t) * tensors_[size_t(table.frequencies)].vector.size();
    table.cosines.resize(n), table.sines.resize(n);
  }
  size_t phases = tables_.size() + 3 * ops_.size() + 1;
  if (counters_.size() < phases) counters_ = std::vector<std::atomic<int64_t>>(phases);
  for (auto& c : counters_) c.store(0, std::memory_order_relaxed);
}

// A sequence whose queries fit one task is cut by splits, so that one long context occupies every thread; others are cut
// by queries. Either way the same splits are merged in the same order.
void Executable::plan_attend(AttendPlan& p) {
  p.tasks.clear(), p.merges.clear(), p.partials = 0;
  const int most = std::max(1, kTaskRows / p.share);
  for (int s = 0; s < int(in_.s); s++) {
    const int n = in_.q_len[s], context = in_.context_len[s];
    for (int token = 0; token < n; token += most) {
      int tokens = std::min(most, n - token), position = context - n + token;
      int first = p.window ? std::max(0, position - p.window + 1) / kSplit : 0;
      int end = (position + tokens + kSplit - 1) / kSplit;
      for (int h = 0; h < p.kv_heads; h++) {
        if (n > most || end - first == 1) {
          p.tasks.push_back({s, token, tokens, h, first, end, -1});
          continue;
        }
        int64_t each = int64_t(tokens) * p.share * (p.v_stride + 2);
        p.merges.push_back({s, h, end - first, p.partials});
        for (int split = first; split < end; split++, p.partials += each)
          p.tasks.push_back({s, token, tokens, h, split, split + 1, p.partials});
      }
    }
  }
}

void Executable::step(const StepInputs& in, const std::vector<Tap>& taps, double* seconds) {
  in_ = in;
  plan_step();
  team_.run([&](int id) {
    uint8_t* mine = scratch_.data() + id * scratch_stride_;
    Thread me{id, 0, (float*)(mine + private_x_), mine};
    fill_tables(me);
    auto before = std::chrono::steady_clock::now();
    for (size_t i = 0; i < ops_.size(); i++) {
      run(me, ops_[i]);
      team_.barrier();
      if (seconds && id == 0) {
        auto now = std::chrono::steady_clock::now();
        seconds[i] = std::chrono::duration<double>(now - before).count();
        before = now;
      }
      if (taps.empty()) continue;
      if (id == 0)
        for (const Tap& tap : taps)
          if (tap.op == int(i)) copy_out(tap.tensor, rows_of(tensors_[size_t(tap.tensor)]), tap.out);
      team_.barrier();
    }
  });
}

void Executable::copy_out(int tensor, int64_t rows, void* out) const {
  const Tensor& t = tensors_[size_t(tensor)];
  const float* from = rows_at(tensor);
  for (int64_t r = 0; r < rows; r++) std::memcpy((float*)out + r * t.cols, from + r * t.ld, size_t(t.cols) * 4);
}

// Threads take chunks of [0, n) until none is left. Who takes which does not matter: no result spans two.
template <class Fn>
void Executable::each(Thread& me, int64_t n, int64_t chunk, Fn f) {
  std::atomic<int64_t>& next = counters_[size_t(me.phase++)];
  if (team_.size() == 1) chunk = n;
  for (int64_t i; (i = next.fetch_add(chunk, std::memory_order_relaxed)) < n;)
    for (int64_t j = i; j < std::min(n, i + chunk); j++) f(j);
}

template <class Fn>
void Executable::each_row(Thread& me, int64_t n, Fn f) {
  each(me, n, std::max<int64_t>(1, n / (4 * team_.size())), f);
}

void Executable::fill_tables(Thread& me) {
  for (RopeTable& table : tables_) {
    const auto& frequencies = tensors_[size_t(table.frequencies)].vector;
    const size_t pairs = frequencies.size();
    each_row(me, in_.t, [&](int64_t t) {
      for (size_t i = 0; i < pairs; i++) {
        double angle = double(float(in_.positions[t]) * frequencies[i]);
        table.cosines[size_t(t) * pairs + i] = float(std::cos(angle) * double(table.factor));
        table.sines[size_t(t) * pairs + i] = float(std::sin(angle) * double(table.factor));
      }
    });
  }
  if (!tables_.empty()) team_.barrier();
}

void Executable::run(Thread& me, const Op& op) {
  switch (op.kind) {
    case Kind::Embed: return embed(me, op);
    case Kind::Select: return select(me, op);
    case Kind::Norm: return norm(me, op);
    case Kind::Linear: return linear(me, op);
    case Kind::Rope: return rope(me, op);
    case Kind::KvWrite: return kv_write(me, op);
    case Kind::Attend: return attend(me, op);
    case Kind::Map: return map(me, op);
    case Kind::Sample: return sample(me, op);
  }
}

// tensors: w, out. floats: scale.
void Executable::embed(Thread& me, const Op& op) {
  const Weight& w = tensors_[size_t(op.tensors[0])].weight->w;
  float* out = rows_at(op.tensors[1]);
  const int64_t ld = tensors_[size_t(op.tensors[1])].ld;
  const float scale = float(op.floats[0]);
  each_row(me, in_.t, [&](int64_t t) {
    unpack_row(w, in_.tokens[t], out + t * ld);
    for (int64_t i = 0; i < w.k; i++) out[t * ld + i] *= scale;
  });
}

// tensors: x, out.
void Executable::select(Thread& me, const Op& op) {
  const Tensor &x = tensors_[size_t(op.tensors[0])], &y = tensors_[size_t(op.tensors[1])];
  each_row(me, in_.r, [&](int64_t r) {
    std::memcpy(rows_at(op.tensors[1]) + r * y.ld, rows_at(op.tensors[0]) + in_.rows[r] * x.ld, size_t(y.cols) * 4);
  });
}

// tensors: x, weight, bias, residual, out. ints: kind, group. floats: eps, offset.
void Executable::norm(Thread& me, const Op& op) {
  auto ld = [&](int i) { return op.tensors[size_t(i)] < 0 ? 0 : tensors_[size_t(op.tensors[size_t(i)])].ld; };
  const Tensor& out = tensors_[size_t(op.tensors[4])];
  NormArgs a{rows_at(op.tensors[0]), vector_at(op.tensors[1]), vector_at(op.tensors[2]), rows_at(op.tensors[3]),
             rows_at(op.tensors[4]), ld(0), ld(3), ld(4), out.cols, op.ints[1] ? op.ints[1] : out.cols,
             int(op.ints[0]), float(op.floats[0]), float(op.floats[1])};
  each_row(me, rows_of(out), [&](int64_t r) { kernels_->norm_row(a, r); });
}

// tensors: x, w, bias, residual, out. ints: x is bf16, activation. floats: scale.
void Executable::linear(Thread& me, const Op& op) {
  const Tensor &x = tensors_[size_t(op.tensors[0])], &out = tensors_[size_t(op.tensors[4])];
  const Weight& w = tensors_[size_t(op.tensors[1])].weight->w;
  const int64_t rows = rows_of(out);
  if (rows == 0) return;
  LinearArgs a{&w, {}, op.ints[0] != 0, rows, rows_at(op.tensors[4]), out.ld, vector_at(op.tensors[2]),
               rows_at(op.tensors[3]), op.tensors[3] < 0 ? 0 : tensors_[size_t(op.tensors[3])].ld,
               float(op.floats[0]), Act(op.ints[1])};
  const bool alone = rows * w.padded_k <= kPrivate;
  lay_rows(w, a.x_bf16, rows, alone ? me.x : prepared_.data(), &a.x);
  auto prepare = [&](int64_t r) { kernels_->prepare_row(w, a.x_bf16, rows_at(op.tensors[0]) + r * x.ld, a.x, r); };
  if (alone) {
    for (int64_t r = 0; r < rows; r++) prepare(r);
  } else {
    each_row(me, rows, prepare);
    team_.barrier();
  }
  const int64_t units = w.units(), blocks = (rows + kRows - 1) / kRows;
  each(me, blocks * units, std::max<int64_t>(1, units / (16 * team_.size())), [&](int64_t i) {
    int64_t first = i / units * kRows;
    kernels_->linear_unit(a, first, std::min<int64_t>(kRows, rows - first), i % units, me.scratch);
  });
}

// tensors: x, frequencies, out. ints: head_dim, interleaved. floats: factor.
void Executable::rope(Thread& me, const Op& op) {
  const Tensor &x = tensors_[size_t(op.tensors[0])], &y = tensors_[size_t(op.tensors[2])];
  const RopeTable& table = tables_[size_t(op.table)];
  const int64_t pairs = int64_t(tensors_[size_t(op.tensors[1])].vector.size()), head_dim = op.ints[0];
  const int64_t step = op.ints[1] ? 2 : 1, gap = op.ints[1] ? 1 : pairs;
  each_row(me, in_.t, [&](int64_t t) {
    const float *c = table.cosines.data() + t * pairs, *s = table.sines.data() + t * pairs;
    for (int64_t h = 0; h < y.cols; h += head_dim) {
      const float* in = rows_at(op.tensors[0]) + t * x.ld + h;
      float* out = rows_at(op.tensors[2]) + t * y.ld + h;
      for (int64_t i = 0; i < pairs; i++) {
        float a = in[i * step], b = in[i * step + gap];
        out[i * step] = a * c[i] - b * s[i];
        out[i * step + gap] = b * c[i] + a * s[i];
      }
      std::memcpy(out + 2 * pairs, in + 2 * pairs, size_t(head_dim - 2 * pairs) * 4);
    }
  });
}

// tensors: k, v, k_cache, v_cache.
void Executable::kv_write(Thread& me, const Op& op) {
  each_row(me, in_.t, [&](int64_t t) {
    const int64_t page = in_.slots[t] / page_, at = in_.slots[t] % page_;
    for (int which = 0; which < 2; which++) {
      const Tensor &x = tensors_[size_t(op.tensors[size_t(which)])], &c = tensors_[size_t(op.tensors[size_t(which + 2)])];
      const float* from = rows_at(op.tensors[size_t(which)]) + t * x.ld;
      for (int64_t h = 0; h < c.heads; h++)
        for (int64_t d = 0; d < c.head_dim; d++) {
          int64_t base = page * c.heads + h;
          int64_t i = which == 0 ? (base * c.head_dim + d) * page_ + at : (base * page_ + at) * c.stride + d;
          float value = from[h * c.head_dim + d];
          if (c.bf16) ((uint16_t*)c.cache->data())[i] = to_bf16(value);
          else ((float*)c.cache->data())[i] = value;
        }
    }
  });
}

AttendArgs Executable::attend_args(const Op& op) const {
  const Tensor &q = tensors_[size_t(op.tensors[0])], &k = tensors_[size_t(op.tensors[1])];
  const Tensor &v = tensors_[size_t(op.tensors[2])], &out = tensors_[size_t(op.tensors[3])];
  return {rows_at(op.tensors[0]), rows_at(op.tensors[3]), q.ld, out.ld, int(op.ints[0]), k.heads, k.head_dim, v.head_dim,
          v.stride, page_, int(op.ints[1]), float(op.floats[0]), float(op.floats[1]), k.bf16, k.cache->data(), v.cache->data()};
}

Query Executable::query(const Task& t) const {
  return {in_.block_table + t.seq * in_.table_width, in_.first_row[t.seq] + t.token,
          in_.context_len[t.seq] - in_.q_len[t.seq] + t.token, t.tokens, t.kv_head};
}

// tensors: q, k_cache, v_cache, out. ints: heads, window. floats: scale, softcap.
void Executable::attend(Thread& me, const Op& op) {
  const AttendPlan& plan = plans_[size_t(op.plan)];
  const AttendArgs a = attend_args(op);
  const int64_t width = a.v_stride;
  auto finish = [&](const Query& q, const float* total, const float* acc) {
    for (int64_t r = 0; r < int64_t(q.tokens) * plan.share; r++) {
      float* out = a.out + (q.first_row + r / plan.share) * a.ld_out + (q.kv_head * plan.share + r % plan.share) * int64_t(a.v_dim);
      for (int64_t d = 0; d < a.v_dim; d++) out[d] = acc[r * width + d] / total[r];
    }
  };
  auto clear = [&](int64_t rows, float* top, float* total, float* acc) {
    std::fill(top, top + rows, -INFINITY);
    std::fill(total, total + rows, 0.0f);
    std::fill(acc, acc + rows * width, 0.0f);
  };
  each(me, int64_t(plan.tasks.size()), 1, [&](int64_t i) {
    const Task& t = plan.tasks[size_t(i)];
    const Query q = query(t);
    const int64_t rows = int64_t(t.tokens) * plan.share;
    if (t.partial >= 0) {
      float* p = (float*)partials_.data() + t.partial;
      return kernels_->attend_split(a, q, t.first_split, me.scratch, p, p + rows, p + 2 * rows);
    }
    float *top = me.scratch + rows * kSplit, *total = top + rows, *acc = total + rows;
    float *top2 = acc + rows * width, *total2 = top2 + rows, *acc2 = total2 + rows;
    clear(rows, top, total, acc);
    for (int split = t.first_split; split < t.end_split; split++) {
      kernels_->attend_split(a, q, split, me.scratch, top2, total2, acc2);
      kernels_->attend_merge(rows, width, top, total, acc, top2, total2, acc2);
    }
    finish(q, total, acc);
  });
  if (plan.merges.empty()) return;
  team_.barrier();
  each(me, int64_t(plan.merges.size()), 1, [&](int64_t i) {
    const Merge& m = plan.merges[size_t(i)];
    const int64_t rows = int64_t(in_.q_len[m.seq]) * plan.share, each_split = rows * (width + 2);
    float *top = me.scratch, *total = top + rows, *acc = total + rows;
    clear(rows, top, total, acc);
    for (int s = 0; s < m.splits; s++) {
      const float* p = (const float*)partials_.data() + m.partial + s * each_split;
      kernels_->attend_merge(rows, width, top, total, acc, p, p + rows, p + 2 * rows);
    }
    finish(query({m.seq, 0, in_.q_len[m.seq], m.kv_head, 0, 0, -1}), total, acc);
  });
}

// tensors: a, b, c, out.
void Executable::map(Thread& me, const Op& op) {
  const Tensor& out = tensors_[size_t(op.tensors[3])];
  MapArgs a{{}, {}, rows_at(op.tensors[3]), out.ld, out.cols, op.code.data(), op.numbers.data(), int64_t(op.code.size() / 2)};
  for (size_t o = 0; o < 3; o++)
    if (op.tensors[o] >= 0) a.operand[o] = rows_at(op.tensors[o]), a.ld[o] = tensors_[size_t(op.tensors[o])].ld;
  each_row(me, rows_of(out), [&](int64_t r) { kernels_->map_row(a, r, me.scratch); });
}

// tensors: logits, tokens, logprobs.
void Executable::sample(Thread& me, const Op& op) {
  const Tensor& logits = tensors_[size_t(op.tensors[0])];
  auto tokens = (int32_t*)rows_at(op.tensors[1]);
  each(me, in_.r, 1, [&](int64_t r) {
    sample_row(*kernels_, rows_at(op.tensors[0]) + r * logits.ld, logits.cols, in_.draws[r], tokens + r, rows_at(op.tensors[2]) + r);
  });
}

}  // namespace intaglio
