#include "executable.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace intaglio {

namespace {

constexpr int64_t kAlign = 64;
constexpr int kTables = -1, kTaps = -2;  // phases that belong to no op
constexpr int kMaxHead = 1024;
constexpr int64_t kLittle = 8192;  // values that one thread is done with before a second has joined in: about 2 us
constexpr int64_t kFetch = 1024, kFetchMost = 128 << 10;  // bytes of weights fetched while waiting: a turn, and at all
constexpr int64_t kPrivate = 16384;  // values of x that each thread rounds for itself rather than wait for the others

int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

}  // namespace

void grow(Memory& m, int64_t bytes) {
  if (m.size() < bytes) m = Memory(bytes + bytes / 4);
}

int64_t lay_rows(const Weight& w, bool x_bf16, int64_t rows, uint8_t* at, Rows* out) {
  int64_t each = w.integer() ? 1 : x_bf16 && w.pairs() ? 2 : 4;
  int64_t groups = w.integer() ? w.padded_k / w.group : 0, spans = w.integer() ? w.spans() : 0;
  const int64_t scales = aligned(rows * w.padded_k * each), starts = scales + aligned(rows * spans * 4);
  if (out) *out = {at, (float*)(at + scales), (int32_t*)(at + starts), rows, w.padded_k, groups};
  return starts + aligned(rows * groups * 4);
}

PackedWeight::PackedWeight(const Format& format, int64_t n, int64_t k, int64_t group, bool glu)
    : w(weight_layout(format, n, k, group, glu)), memory(std::make_shared<Memory>(bytes())) {
  w.data = memory->data();
}

template <class Pack>
void PackedWeight::share(int64_t first, int64_t count, int threads, Pack pack) {
  if (first < 0 || count < 0 || first + count > w.n) throw std::invalid_argument("rows outside the weight");
  if (!memory->writable()) throw std::invalid_argument("a weight mapped from a file is only read");
  if (!count) return;
  const int64_t begin = w.glu ? 0 : w.panel_of(first), panels = (w.glu ? w.panels : w.panel_of(first + count - 1) + 1) - begin;
  std::vector<std::thread> helpers;
  auto part = [&](int i) { pack(begin + panels * i / threads, begin + panels * (i + 1) / threads); };
  for (int i = 1; i < threads; i++) helpers.emplace_back(part, i);
  part(0);
  for (auto& t : helpers) t.join();
}

void PackedWeight::fill(const void* rows, Source type, int64_t first, int64_t count, int threads, const Kernels& kernels) {
  share(first, count, threads, [&](int64_t begin, int64_t end) { pack_rows(w, rows, type, first, count, begin, end, kernels); });
}

void PackedWeight::fill_codes(const CodedRows& rows, int64_t first, int64_t count, int threads) {
  share(first, count, threads, [&](int64_t begin, int64_t end) { pack_coded(w, rows, first, count, begin, end); });
}

void PackedWeight::place(std::shared_ptr<Memory> region, int64_t offset) {
  if (offset < 0 || offset % kAlign || offset + bytes() > region->size()) throw std::invalid_argument("a weight outside its region");
  memory = std::move(region);
  w.data = memory->data() + offset;
}

Executable::Executable(const Kernels* kernels, int threads, int page, const Limits& limits)
    : kernels_(kernels),
      page_(page),
      limits_(limits),
      scratches_(size_t(threads)),
      team_(
          threads,
          [this](int thread, const Phase& phase, int64_t begin, int64_t end) { run(scratches_[size_t(thread)], phase, begin, end); },
          [this](int thread, int op) { run_op(scratches_[size_t(thread)], ops_[size_t(op)], 0, rows_of(ops_[size_t(op)])); },
          [this](int thread, const Phase& coming, int64_t turn) { fetch_ahead(thread, coming, turn); }) {}

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
    RopeTable table{op.tensors[1], float(op.floats[0]), int(ops_.size()), {}, {}};
    auto same = [&](const RopeTable& t) { return t.frequencies == table.frequencies && t.factor == table.factor; };
    auto at = std::find_if(tables_.begin(), tables_.end(), same);
    op.table = int(at - tables_.begin());
    if (at == tables_.end()) tables_.push_back(table);
  }
  if (op.kind == Kind::Attend) {
    const Tensor &k = tensors_[size_t(op.tensors[1])], &v = tensors_[size_t(op.tensors[2])];
    const int heads = int(op.ints[0]), v_stride = v.keys ? (v.head_dim + 15) / 16 * 16 : v.stride;
    int share = heads / k.heads;
    if (k.heads == 1)  // one head for all: tasks take as many query heads as they aim at
      for (share = std::min(share, kTaskRows); heads % share; share--) {}
    AttendPlan plan{heads / share, share, v_stride, {int(op.ints[1]), int(op.ints[2])}, {}, {}, 0};
    if (plan.share > kMaxTaskRows) throw std::invalid_argument("more than 256 query heads share one kv head");
    auto same = [&](const AttendPlan& p) {
      return p.kv_heads == plan.kv_heads && p.share == plan.share && p.v_stride == plan.v_stride && p.reach == plan.reach;
    };
    auto at = std::find_if(plans_.begin(), plans_.end(), same);
    op.plan = int(at - plans_.begin());
    if (at == plans_.end()) plans_.push_back(plan);
  }
  ops_.push_back(std::move(op));
}

Tensor Executable::make_cache(int64_t pages, int heads, int head_dim, Fmt format, bool keys) const {
  if (head_dim > kMaxHead) throw std::invalid_argument("a head of more than 1024 values");
  Tensor t;
  t.heads = heads, t.head_dim = head_dim, t.format = format, t.keys = keys;
  t.stride = keys ? page_ : (head_dim + 15) / 16 * 16;
  t.cache = std::make_unique<Memory>(pages * heads * block_bytes(format, keys ? head_dim : t.stride, page_) + kAlign);
  return t;
}

int64_t Executable::rows_of(const Tensor& t) const {
  return buffers_[size_t(t.buffer)].rows.of(in_.t, in_.r);
}

// Rows that an op works through: its last tensor is a result of that many rows, or a cache written token by token.
int64_t Executable::rows_of(const Op& op) const {
  return op.kind == Kind::KvWrite ? in_.t : rows_of(tensors_[size_t(op.tensors.back())]);
}

// Values in a row that such an op works on.
int64_t Executable::width_of(const Op& op) const {
  const bool from_first = op.kind == Kind::KvWrite || op.kind == Kind::Sample || op.kind == Kind::Route;
  return tensors_[size_t(from_first ? op.tensors.front() : op.tensors.back())].cols;
}

float* Executable::rows_at(int tensor) const {
  if (tensor < 0) return nullptr;
  const Tensor& t = tensors_[size_t(tensor)];
  return (float*)(arena_.data() + buffers_[size_t(t.buffer)].offset) + t.column;
}

const float* Executable::vector_at(int tensor) const {
  return tensor < 0 ? nullptr : tensors_[size_t(tensor)].vector.data();
}

// Whether each thread rounds all rows of x for itself.
bool Executable::alone(const Op& op) const {
  const Weight& w = tensors_[size_t(op.tensors[1])].weight->w;
  return rows_of(tensors_[size_t(op.tensors[4])]) * w.padded_k <= kPrivate;
}

void Executable::check(const StepInputs& in) const {
  auto within = [](const char* what, const int32_t* values, int64_t n, int64_t low, int64_t limit) {
    if (std::any_of(values, values + n, [&](int64_t v) { return v < low || v >= limit; })) throw std::out_of_range(what);
  };
  within("token id", in.tokens, in.t, 0, limits_.token);
  within("position", in.positions, in.t, 0, limits_.position);
  within("slot", in.slots, in.t, 0, limits_.slot);
  within("block", in.block_table, in.s * in.table_width, -1, limits_.block);
  within("row", in.rows, in.r, 0, in.t);
}

// Cuts attention into tasks; where the step has other rows than the last had, sizes every piece of memory for them.
void Executable::plan_memory() {
  int64_t partials = 0;
  for (AttendPlan& p : plans_) {
    plan_attend(p);
    partials = std::max(partials, p.partials);
  }
  grow(partials_, partials * 4);
  if (in_.t == planned_t_ && in_.r == planned_r_) return;
  planned_t_ = in_.t, planned_r_ = in_.r;
  int64_t at = 0;
  for (Buffer& b : buffers_) {
    b.offset = at;
    at += aligned(b.row_bytes * b.rows.of(in_.t, in_.r)) + kAlign;
  }
  grow(arena_, at);
  int64_t shared = 0, floats = 2 * kRows * kPanel, own_x = 0;
  for (const Op& op : ops_)
    if (op.kind == Kind::Linear) {
      const Weight& w = tensors_[size_t(op.tensors[1])].weight->w;
      int64_t bytes = lay_rows(w, op.ints[0], rows_of(tensors_[size_t(op.tensors[4])]), nullptr, nullptr);
      int64_t& most = alone(op) ? own_x : shared;
      most = std::max(most, bytes);
    } else if (op.kind == Kind::Experts) {
      plan_experts(op);
      const ExpertsView v = experts_view(op);
      floats = std::max({floats, v.up->k, v.down->k});
    } else if (op.kind == Kind::HeadLinear) {
      shared = std::max(shared, op.ints[0] * lay_rows(tensors_[size_t(op.tensors[1])].weight->w, false, in_.t, nullptr, nullptr));
    }
  for (const AttendPlan& p : plans_)
    floats = std::max<int64_t>(floats, std::max(kTaskRows, p.share) * (kSplit + 2 * p.v_stride + 4));
  grow(prepared_, shared);
  const int64_t stride = aligned(4 * floats) + aligned(own_x);
  grow(scratch_, stride * team_.size());
  for (int i = 0; i < team_.size(); i++) {
    uint8_t* mine = scratch_.data() + i * stride;
    scratches_[size_t(i)] = {(float*)(mine + aligned(own_x)), mine, nullptr};
  }
  for (RopeTable& table : tables_) {
    size_t n = size_t(in_.t) * tensors_[size_t(table.frequencies)].vector.size();
    table.cosines.resize(n), table.sines.resize(n);
  }
}

// The step as phases, kept for the next of the same shape: it takes longer to walk the cold ops than to run many of them.
// Rows go in chunks of a quarter of a thread's share; products by columns; attention by task.
void Executable::plan_phases(bool timed, int first, int last) {
  std::vector<int64_t> shape{in_.t, in_.r, first, last, timed};
  for (const AttendPlan& p : plans_) shape.insert(shape.end(), {int64_t(p.tasks.size()), int64_t(p.merges.size())});
  for (const Tap& tap : taps_) shape.insert(shape.end(), {tap.op, tap.tensor});
  if (shape == planned_) return;
  planned_.clear();
  const int threads = team_.size();
  auto chunk = [&](int64_t rows) { return std::max<int64_t>(1, rows / (4 * threads)); };
  team_.clear(timed);
  for (size_t i = 0; first == 0 && i < tables_.size(); i++) team_.add(kTables, int(i), in_.t, chunk(in_.t));
  for (int at = first; at < last; at++) {
    const Op& op = ops_[size_t(at)];
    const int64_t rows = rows_of(op);
    switch (op.kind) {
      case Kind::Linear: {
        const int64_t units = tensors_[size_t(op.tensors[1])].weight->w.units();
        if (!alone(op)) team_.add(at, 0, rows, chunk(rows));
        team_.add(at, 1, (rows + kRows - 1) / kRows * units, std::max<int64_t>(1, units / (16 * threads)));
        break;
      }
      case Kind::Attend: {
        const AttendPlan& plan = plans_[size_t(op.plan)];
        team_.add(at, 0, int64_t(plan.tasks.size()), 1);
        team_.add(at, 1, int64_t(plan.merges.size()), 1);
        break;
      }
      case Kind::Experts: add_experts(at, op); break;
      case Kind::HeadLinear: add_heads(at, op); break;
      default:
        if ((rows == 1 || rows * width_of(op) <= kLittle) && team_.append(at)) break;
        team_.add(at, 0, rows, op.kind == Kind::Sample ? 1 : chunk(rows));
    }
    for (size_t t = 0; t < taps_.size(); t++)
      if (taps_[t].op == at) team_.add(kTaps, int(t), 1, 1);
  }
  planned_ = std::move(shape);
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
      int first = int(p.reach.first(position)) / kSplit;
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

void Executable::step(const StepInputs& in, const std::vector<Tap>& taps, double* seconds, int first, int last) {
  check(in);
  in_ = in;
  taps_ = taps;
  if (first == 0) plan_memory();
  for (Scratch& mine : scratches_) mine.holds = nullptr;
  plan_phases(seconds != nullptr, first, last);
  auto before = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  team_.run();
  for (int64_t i = 0; seconds && i < team_.count(); i++) {
    const Phase& p = team_.phase(i);
    const int op = p.op == kTables ? tables_[size_t(p.part)].op : p.op;
    if (op >= 0) seconds[op] += team_.finished(i) - before;
    before = team_.finished(i);
  }
}

void Executable::copy_out(int tensor, int64_t rows, void* out) const {
  const Tensor& t = tensors_[size_t(tensor)];
  const float* from = rows_at(tensor);
  for (int64_t r = 0; r < rows; r++) std::memcpy((float*)out + r * t.cols, from + r * t.ld, size_t(t.cols) * 4);
}

void Executable::copy_in(int tensor, int64_t rows, const void* from) {
  const Tensor& t = tensors_[size_t(tensor)];
  float* to = rows_at(tensor);
  for (int64_t r = 0; r < rows; r++) std::memcpy(to + r * t.ld, (const float*)from + r * t.cols, size_t(t.cols) * 4);
}

void Executable::run(Scratch& mine, const Phase& phase, int64_t begin, int64_t end) {
  if (phase.op == kTables) {
    for (int64_t t = begin; t < end; t++) table_row(tables_[size_t(phase.part)], t);
  } else if (phase.op == kTaps) {
    const Tap& tap = taps_[size_t(phase.part)];
    copy_out(tap.tensor, rows_of(tensors_[size_t(tap.tensor)]), tap.out);
  } else {
    const Op& op = ops_[size_t(phase.op)];
    if (op.kind == Kind::Linear) {
      if (phase.part == 0) prepare(linear_args(op, prepared_.data()), op, begin, end);
      else product(mine, phase, op, begin, end);
    } else if (op.kind == Kind::Attend) {
      const AttendPlan& plan = plans_[size_t(op.plan)];
      for (int64_t i = begin; i < end; i++)
        if (phase.part == 0) attend_task(mine, op, plan.tasks[size_t(i)]);
        else attend_merge(mine, op, plan.merges[size_t(i)]);
    } else if (op.kind == Kind::Experts) {
      run_experts(mine, op, phase.part, begin, end);
    } else if (op.kind == Kind::HeadLinear) {
      run_heads(mine, op, phase.part, begin, end);
    } else {
      run_op(mine, op, begin, end);
    }
  }
}

// The weights that a thread is likely to take first in the product to come, on their way while it waits.
void Executable::fetch_ahead(int thread, const Phase& coming, int64_t turn) const {
  if (coming.op < 0 || ops_[size_t(coming.op)].kind != Kind::Linear) return;
  const Weight& w = tensors_[size_t(ops_[size_t(coming.op)].tensors[1])].weight->w;
  const int64_t first = coming.begin_of(thread) % w.units() * w.unit_bytes(), from = turn * kFetch, to = std::min(from + kFetch, w.unit_bytes());
  if (from >= kFetchMost) return;
  for (int64_t b = from; b < to; b += 64) __builtin_prefetch(w.data + first + b, 0, 2);
}

// Rows [begin, end) of an op that works row by row.
void Executable::run_op(Scratch& mine, const Op& op, int64_t begin, int64_t end) {
  auto each = [&](auto f) {
    for (int64_t i = begin; i < end; i++) f(i);
  };
  switch (op.kind) {
    case Kind::Embed: return each([&](int64_t t) { embed(op, t); });
    case Kind::Select: return each([&](int64_t r) { select(op, r); });
    case Kind::Permute: return each([&](int64_t r) { permute(op, r); });
    case Kind::Rope: return each([&](int64_t t) { rope(op, t); });
    case Kind::KvWrite: return each([&](int64_t t) { kv_write(op, t); });
    case Kind::Norm: return each([&, a = norm_args(op)](int64_t r) { kernels_->norm_row(a, r); });
    case Kind::Map: return each([&, a = map_args(op)](int64_t r) { kernels_->map_row(a, r, mine.floats); });
    case Kind::Sample: return each([&](int64_t r) { sample(op, r); });
    case Kind::Route: return each([&, a = route_args(op)](int64_t t) { kernels_->route_row(a, t, mine.floats); });
    case Kind::Experts: return sort_tokens(op);  // what of it is no phase of its own
    case Kind::Linear:
    case Kind::Attend:
    case Kind::HeadLinear: break;  // run() cuts these otherwise
    case Kind::Exchange: break;
  }
}

// tensors: logits, tokens, logprobs.
void Executable::sample(const Op& op, int64_t r) {
  const Tensor& x = tensors_[size_t(op.tensors[0])];
  auto tokens = (int32_t*)rows_at(op.tensors[1]);
  sample_row(*kernels_, rows_at(op.tensors[0]) + r * x.ld, x.cols, in_.draws[r], tokens + r, rows_at(op.tensors[2]) + r);
}

void Executable::table_row(RopeTable& table, int64_t t) {
  const auto& frequencies = tensors_[size_t(table.frequencies)].vector;
  const size_t pairs = frequencies.size(), at = size_t(t) * pairs;
  for (size_t i = 0; i < pairs; i++) {
    double angle = double(float(in_.positions[t]) * frequencies[i]);
    table.cosines[at + i] = float(std::cos(angle) * double(table.factor));
    table.sines[at + i] = float(std::sin(angle) * double(table.factor));
  }
}

// tensors: w, out. floats: scale.
void Executable::embed(const Op& op, int64_t t) {
  const Weight& w = tensors_[size_t(op.tensors[0])].weight->w;
  float* out = rows_at(op.tensors[1]) + t * tensors_[size_t(op.tensors[1])].ld;
  unpack_row(w, in_.tokens[t], out);
  for (int64_t i = 0; i < w.k; i++) out[i] *= float(op.floats[0]);
}

// tensors: x, out.
void Executable::select(const Op& op, int64_t r) {
  const Tensor &x = tensors_[size_t(op.tensors[0])], &y = tensors_[size_t(op.tensors[1])];
  std::memcpy(rows_at(op.tensors[1]) + r * y.ld, rows_at(op.tensors[0]) + in_.rows[r] * x.ld, size_t(y.cols) * 4);
}

// tensors: x, order, out.
void Executable::permute(const Op& op, int64_t r) {
  const Tensor &x = tensors_[size_t(op.tensors[0])], &y = tensors_[size_t(op.tensors[2])];
  const float *from = rows_at(op.tensors[0]) + r * x.ld, *order = vector_at(op.tensors[1]);  // whole numbers below 2^24
  float* to = rows_at(op.tensors[2]) + r * y.ld;
  for (int64_t i = 0; i < y.cols; i++) to[i] = from[int(order[i])];
}

// tensors: x, weight, bias, residual, out. ints: kind, group. floats: eps, offset.
NormArgs Executable::norm_args(const Op& op) const {
  auto ld = [&](int i) { return op.tensors[size_t(i)] < 0 ? 0 : tensors_[size_t(op.tensors[size_t(i)])].ld; };
  const Tensor& out = tensors_[size_t(op.tensors[4])];
  return {rows_at(op.tensors[0]), vector_at(op.tensors[1]), vector_at(op.tensors[2]), rows_at(op.tensors[3]),
          rows_at(op.tensors[4]), ld(0), ld(3), ld(4), out.cols, op.ints[1] ? op.ints[1] : out.cols,
          int(op.ints[0]), float(op.floats[0]), float(op.floats[1])};
}

// tensors: a, b, c, out.
MapArgs Executable::map_args(const Op& op) const {
  const Tensor& out = tensors_[size_t(op.tensors[3])];
  MapArgs a{{}, {}, {}, rows_at(op.tensors[3]), out.ld, out.cols, op.code.data(), op.numbers.data(), int64_t(op.code.size() / 2)};
  for (size_t o = 0; o < 3; o++)
    if (op.tensors[o] >= 0) {
      const Tensor& x = tensors_[size_t(op.tensors[o])];
      a.operand[o] = rows_at(op.tensors[o]), a.ld[o] = x.ld, a.column[o] = x.cols == 1 && out.cols > 1;
    }
  return a;
}

// tensors: x, w, bias, residual, out. ints: x is bf16, activation. floats: scale.
LinearArgs Executable::linear_args(const Op& op, uint8_t* x) const {
  const Tensor& out = tensors_[size_t(op.tensors[4])];
  const Weight& w = tensors_[size_t(op.tensors[1])].weight->w;
  LinearArgs a{&w, {}, op.ints[0] != 0, rows_at(op.tensors[4]), out.ld, vector_at(op.tensors[2]),
               rows_at(op.tensors[3]), op.tensors[3] < 0 ? 0 : tensors_[size_t(op.tensors[3])].ld,
               float(op.floats[0]), Act(op.ints[1])};
  lay_rows(w, a.x_bf16, rows_of(out), x, &a.x);
  return a;
}

void Executable::prepare(const LinearArgs& a, const Op& op, int64_t begin, int64_t end) const {
  const int64_t ld = tensors_[size_t(op.tensors[0])].ld;
  for (int64_t row = begin; row < end; row++) kernels_->prepare_row(*a.w, a.x_bf16, rows_at(op.tensors[0]) + row * ld, a.x, row);
}

// Units of columns; a thread that rounds x for itself does so before its first.
void Executable::product(Scratch& mine, const Phase& phase, const Op& op, int64_t begin, int64_t end) {
  const bool own = alone(op);
  const LinearArgs a = linear_args(op, own ? mine.x : prepared_.data());
  if (own && mine.holds != &phase) {
    prepare(a, op, 0, a.x.m);
    mine.holds = &phase;
  }
  const int64_t units = a.w->units();
  for (int64_t i = begin; i < end; i++) {
    int64_t first = i / units * kRows;
    kernels_->linear_unit(a, first, std::min<int64_t>(kRows, a.x.m - first), i % units, mine.floats);
  }
}

// tensors: x, frequencies, out. ints: head_dim, interleaved, trailing. floats: factor.
void Executable::rope(const Op& op, int64_t t) {
  const Tensor &x = tensors_[size_t(op.tensors[0])], &y = tensors_[size_t(op.tensors[2])];
  const RopeTable& table = tables_[size_t(op.table)];
  const int64_t pairs = int64_t(tensors_[size_t(op.tensors[1])].vector.size()), head_dim = op.ints[0];
  const int64_t step = op.ints[1] ? 2 : 1, gap = op.ints[1] ? 1 : pairs;
  const float *c = table.cosines.data() + t * pairs, *s = table.sines.data() + t * pairs;
  const int64_t still = head_dim - 2 * pairs, lead = op.ints[2] ? still : 0, rest = op.ints[2] ? 0 : 2 * pairs;
  for (int64_t h = 0; h < y.cols; h += head_dim) {
    const float *own = rows_at(op.tensors[0]) + t * x.ld + h, *in = own + lead;
    float *to = rows_at(op.tensors[2]) + t * y.ld + h, *out = to + lead;
    for (int64_t i = 0; i < pairs; i++) {
      float a = in[i * step], b = in[i * step + gap];
      out[i * step] = a * c[i] - b * s[i];
      out[i * step + gap] = b * c[i] + a * s[i];
    }
    std::memcpy(to + rest, own + rest, size_t(still) * 4);
  }
}

// tensors: k, v, k_cache, v_cache. Keys stand in columns of a page, values in rows.
void Executable::kv_write(const Op& op, int64_t t) {
  const int64_t page = in_.slots[t] / page_, at = in_.slots[t] % page_;
  for (size_t which = 0; which < 2; which++) {
    const Tensor &x = tensors_[size_t(op.tensors[which])], &c = tensors_[size_t(op.tensors[which + 2])];
    const int64_t width = c.keys ? c.head_dim : c.stride, first = c.keys ? at : at * width, step = c.keys ? page_ : 1;
    for (int64_t h = 0; h < c.heads; h++) {
      const float* from = rows_at(op.tensors[which]) + t * x.ld + h * c.head_dim;
      uint8_t* to = c.cache->data() + (page * c.heads + h) * block_bytes(c.format, width, page_);
      auto put = [&](auto* values, const auto* x, auto convert) {
        for (int64_t d = 0; d < c.head_dim; d++) values[first + d * step] = convert(x[d]);
      };
      if (c.format == Fmt::F32) {
        put((float*)to, from, [](float f) { return f; });
      } else if (c.format == Fmt::BF16) {
        put((uint16_t*)to, from, to_bf16);
      } else {
        int8_t codes[kMaxHead];
        ((uint16_t*)(to + width * page_))[at] = encode_row(from, c.head_dim, codes);
        put((int8_t*)to, codes, [](int8_t code) { return code; });
      }
    }
  }
}

// tensors: q, k_cache, v_cache, rope_cache, sinks, out. ints: heads, window, chunk, temper_every.
// floats: scale, softcap, temper.
AttendArgs Executable::attend_args(const Op& op) const {
  const Tensor &q = tensors_[size_t(op.tensors[0])], &k = tensors_[size_t(op.tensors[1])];
  const Tensor &v = tensors_[size_t(op.tensors[2])], &out = tensors_[size_t(op.tensors[5])];
  const Tensor* rope = op.tensors[3] < 0 ? nullptr : &tensors_[size_t(op.tensors[3])];
  const AttendPlan& plan = plans_[size_t(op.plan)];
  const bool latent = &k == &v;
  return {rows_at(op.tensors[0]), rows_at(op.tensors[5]), q.ld, out.ld, int(op.ints[0]), plan.kv_heads, k.head_dim,
               v.head_dim, plan.v_stride, page_, plan.reach, float(op.floats[0]), float(op.floats[1]), k.format, k.cache->data(),
               latent ? nullptr : v.cache->data(), rope ? rope->cache->data() : nullptr, rope ? rope->head_dim : 0, latent,
               k.heads == 1, vector_at(op.tensors[4]), float(op.floats[2]), float(op.ints[3])};
}

Query Executable::query(const Task& t) const {
  return {in_.block_table + t.seq * in_.table_width, in_.first_row[t.seq] + t.token,
          in_.context_len[t.seq] - in_.q_len[t.seq] + t.token, t.tokens, t.kv_head};
}

namespace {
// The running softmax of some rows: maximum, sum, weighted values.
struct Running {
  float *top, *total, *acc;
  Running(float* at, int64_t rows) : top(at), total(at + rows), acc(at + 2 * rows) {}
  void clear(int64_t rows, int64_t width) const {
    std::fill(top, top + rows, -INFINITY);
    std::fill(total, acc + rows * width, 0.0f);
  }
};
}  // namespace

void Executable::attend_task(Scratch& mine, const Op& op, const Task& t) {
  const AttendArgs a = attend_args(op);
  const Query q = query(t);
  const int64_t rows = int64_t(t.tokens) * plans_[size_t(op.plan)].share, size = rows * (a.v_stride + 2);
  if (t.partial >= 0) {
    Running one((float*)partials_.data() + t.partial, rows);
    return kernels_->attend_split(a, q, t.first_split, mine.floats, one.top, one.total, one.acc);
  }
  Running all(mine.floats + rows * kSplit, rows), one(mine.floats + rows * kSplit + size, rows);
  all.clear(rows, a.v_stride);
  for (int split = t.first_split; split < t.end_split; split++) {
    kernels_->attend_split(a, q, split, mine.floats, one.top, one.total, one.acc);
    kernels_->attend_merge(rows, a.v_stride, all.top, all.total, all.acc, one.top, one.total, one.acc);
  }
  finish_attend(a, q, all.top, all.total, all.acc);
}

void Executable::attend_merge(Scratch& mine, const Op& op, const Merge& m) {
  const AttendArgs a = attend_args(op);
  const int64_t rows = int64_t(in_.q_len[m.seq]) * plans_[size_t(op.plan)].share;
  Running all(mine.floats, rows);
  all.clear(rows, a.v_stride);
  for (int s = 0; s < m.splits; s++) {
    Running one((float*)partials_.data() + m.partial + s * rows * (a.v_stride + 2), rows);
    kernels_->attend_merge(rows, a.v_stride, all.top, all.total, all.acc, one.top, one.total, one.acc);
  }
  finish_attend(a, query({m.seq, 0, in_.q_len[m.seq], m.kv_head, 0, 0, -1}), all.top, all.total, all.acc);
}

void Executable::finish_attend(const AttendArgs& a, const Query& q, const float* top, const float* total, const float* acc) const {
  const int64_t share = a.heads / a.kv_heads;
  for (int64_t r = 0; r < q.tokens * share; r++) {
    float* out = a.out + (q.first_row + r / share) * a.ld_out + (q.kv_head * share + r % share) * a.v_dim;
    float weight = 1, whole = total[r];
    if (a.sinks) {  // one more key, without a value
      const float sink = a.sinks[q.kv_head * share + r % share], most = std::max(top[r], sink);
      weight = std::exp(top[r] - most), whole = whole * weight + std::exp(sink - most);
    }
    for (int64_t d = 0; d < a.v_dim; d++) out[d] = acc[r * a.v_stride + d] * weight / whole;
  }
}

}  // namespace intaglio
