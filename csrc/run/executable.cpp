// Executable: creates tensors and ops, copies cache pages, plans a step, runs it from one stop (an op of the caller) to the next.
#include "run/executable.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include "comm/communicator.h"

namespace intaglio {

namespace {
double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
}  // namespace

Executable::Executable(const Kernels& kernels, int threads, int page, const Limits& limits)
    : limits_(limits), context_{kernels, threads, page}, team_(threads) {}

int Executable::add(Tensor t) {
  tensors_.push_back(std::move(t));
  return int(tensors_.size()) - 1;
}

int Executable::add_buffer(int64_t row_bytes, Extent rows) {
  buffers_.push_back({row_bytes, rows});
  return int(buffers_.size()) - 1;
}

int Executable::add_columns(int buffer, int64_t cols, int64_t ld, int64_t column) {
  Tensor t;
  t.buffer = &buffers_.at(size_t(buffer)), t.cols = cols, t.ld = ld, t.column = column;
  return add(std::move(t));
}

int Executable::add_vector(std::vector<float> values) {
  Tensor t;
  t.vector = std::move(values);
  return add(std::move(t));
}

int Executable::add_weight(std::shared_ptr<PackedWeight> weight, std::vector<int64_t> shape) {
  Tensor t;
  t.weight = std::move(weight), t.shape = std::move(shape);
  return add(std::move(t));
}

Memory Executable::part_of_cache_file(int64_t bytes) {
  constexpr int64_t kPart = 2 << 20;  // a huge page
  const int64_t offset = cache_end_;
  cache_end_ = (offset + bytes + kPart - 1) / kPart * kPart;
  struct stat facts;
  if (fstat(cache_file_, &facts) || (facts.st_size < cache_end_ && ftruncate(cache_file_, cache_end_)))
    throw std::system_error(errno, std::generic_category(), "the file of the K/V cache");
  return Memory(cache_file_, bytes, true, offset);
}

int Executable::add_cache(int64_t pages, int heads, int head_dim, Fmt format, bool keys, bool windowed, int rows) {
  rows = rows ? rows : context_.page;
  const int stride = keys ? rows : (head_dim + 15) / 16 * 16;
  const int64_t bytes = pages * heads * block_bytes(format, keys ? head_dim : stride, rows);
  Tensor t;
  Memory memory = cache_file_ < 0 ? Memory(bytes + kAlign) : part_of_cache_file(bytes + kAlign);
  t.cache = std::make_unique<Cache>(Cache{std::move(memory), format, heads, head_dim, stride, keys, windowed, rows});
  return add(std::move(t));
}

int64_t Executable::page_bytes() const {
  int64_t total = 0;
  for (const Tensor& t : tensors_)
    if (t.cache) total += t.cache->page_bytes();
  return total;
}

std::vector<int64_t> Executable::page_parts() const {
  std::vector<int64_t> parts;
  for (const Tensor& t : tensors_)
    if (t.cache) parts.push_back(t.cache->page_bytes());
  return parts;
}

void Executable::read_page(int64_t page, uint8_t* out) const {
  check_page(page);
  for (const Tensor& t : tensors_) {
    if (!t.cache) continue;
    const int64_t bytes = t.cache->page_bytes();
    std::memcpy(out, t.cache->memory.data() + page * bytes, size_t(bytes));
    out += bytes;
  }
}

void Executable::write_page(int64_t page, const uint8_t* from) {
  check_page(page);
  for (const Tensor& t : tensors_) {
    if (!t.cache) continue;
    const int64_t bytes = t.cache->page_bytes();
    std::memcpy(t.cache->memory.data() + page * bytes, from, size_t(bytes));
    from += bytes;
  }
}

void Executable::check_page(int64_t page) const {
  if (page < 0 || page >= limits_.block)
    throw std::out_of_range("page " + std::to_string(page) + " is outside 0.." + std::to_string(limits_.block - 1));
}

int Executable::add_states(int64_t slots, int64_t floats) {
  const int64_t bytes = slots * floats * 4 + kAlign;
  Tensor t;
  t.states = std::make_unique<States>(States{cache_file_ < 0 ? Memory(bytes) : part_of_cache_file(bytes), floats});
  return add(std::move(t));
}

int Executable::add_op(const std::string& kind, const std::map<std::string, int>& operands, std::map<std::string, Attribute> attributes) {
  auto factory = op_factories().find(kind);
  if (factory == op_factories().end()) throw std::invalid_argument("the host has no kernel for op " + kind);
  std::map<std::string, const Tensor*> tensors;
  for (const auto& [name, tensor] : operands) tensors[name] = &tensors_.at(size_t(tensor));
  OpArgs args(context_, int(ops_.size()), shared_, std::move(tensors), std::move(attributes));
  std::unique_ptr<OpKernel> op = factory->second(args);
  args.check_all_used();
  for (size_t i = ops_.size(); op->fetches() && i-- > 0 && ops_[i] && !ops_[i]->fetches();) ops_[i]->set_next(*op);
  ops_.push_back(std::move(op));
  return int(ops_.size()) - 1;
}

const std::vector<int64_t>& Executable::expert_tokens(int op) const {
  const OpKernel* kernel = ops_.at(size_t(op)).get();
  const std::vector<int64_t>* found = kernel ? kernel->expert_tokens() : nullptr;
  if (!found) throw std::invalid_argument("op " + std::to_string(op) + " has no experts");
  return *found;
}

void Executable::place_experts(int op, const std::vector<int64_t>& held, const std::vector<int64_t>& copy, const std::vector<int64_t>& copies) {
  expert_tokens(op);  // throws for an op without experts
  ops_.at(size_t(op))->place_experts(held, copy, copies);
}

void Executable::set_vector(int tensor, const std::vector<float>& values) {
  std::vector<float>& own = tensors_.at(size_t(tensor)).vector;
  if (own.size() != values.size()) throw std::invalid_argument("the vector has " + std::to_string(own.size()) + " values, not " + std::to_string(values.size()));
  std::copy(values.begin(), values.end(), own.begin());
}

int Executable::add_stop() {
  stops_.push_back(int(ops_.size()));
  ops_.push_back(nullptr);
  return stops_.back();
}

void Executable::join(std::shared_ptr<Communicator> communicator) {
  communicator_ = std::move(communicator), context_.communicator = communicator_.get();
}

void Executable::check(const StepInputs& in) const {
  auto within = [](const char* what, const int32_t* values, int64_t n, int64_t low, int64_t limit) {
    if (std::any_of(values, values + n, [&](int64_t v) { return v < low || v >= limit; })) throw std::out_of_range(what);
  };
  within("token id", in.tokens, in.t, 0, limits_.token);
  within("position", in.positions, in.t, 0, limits_.position);
  within("slot", in.slots, in.t, 0, limits_.slot);
  within("block", in.block_table, in.s * in.table_width, -1, limits_.block);
  if ((in.window_table != nullptr) != (limits_.window_block > 0)) throw std::out_of_range("window table");
  if (in.window_table) {
    within("window slot", in.window_slots, in.t, 0, limits_.window_slot);
    within("window block", in.window_table, in.s * in.table_width, -1, limits_.window_block);
  }
  within("state slot", in.state_from, in.s, -1, limits_.state);
  within("state slot", in.state_to, in.s, limits_.state ? 0 : -1, limits_.state);
  within("row", in.rows, in.r, 0, in.t);
}

// Everything on which a plan depends.
std::vector<int64_t> Executable::key(bool timed) const {
  const StepInputs& in = context_.in;
  std::vector<int64_t> key{in.t, in.r, in.s, timed, int64_t(taps_.size())};
  for (const Tap& tap : taps_) key.insert(key.end(), {tap.op, tap.tensor});
  for (const auto& shared : shared_) shared->add_key(in, key);
  return key;
}

std::unique_ptr<Plan> Executable::make_plan(std::vector<int64_t> key, bool timed) {
  auto plan = std::make_unique<Plan>();
  plan->key = std::move(key);
  for (Buffer& b : buffers_) {
    b.rows = b.extent.of(context_.in.t, context_.in.r);
    plan->offsets.push_back(plan->arena);
    plan->arena += aligned(b.row_bytes * b.rows) + kAlign;
  }
  Planner p(context_, timed, *plan);
  for (const auto& shared : shared_) plan->shared.push_back(shared->plan(p));
  for (size_t i = 0; i < ops_.size(); i++) {
    if (!ops_[i]) {
      p.stop();
      continue;
    }
    p.begin(ops_[i].get(), int(i), std::any_of(taps_.begin(), taps_.end(), [&](const Tap& tap) { return tap.op == int(i); }));
    ops_[i]->plan(p);
    p.begin(&tap_copy_, -1);
    for (size_t tap = 0; tap < taps_.size(); tap++)
      if (taps_[tap].op == int(i)) p.phase(int(tap), 1, 1);
  }
  return plan;
}

// Sizes all memory for a plan, and points buffers and scratch into it.
void Executable::use(const Plan& plan) {
  arena_.grow(plan.arena), workspace_.grow(plan.workspace);
  for (size_t i = 0; i < buffers_.size(); i++) {
    buffers_[i].rows = buffers_[i].extent.of(context_.in.t, context_.in.r);
    buffers_[i].data = arena_.data() + plan.offsets[i];
  }
  const int64_t own = aligned(plan.own_rows), stride = own + aligned(4 * plan.floats);
  scratch_.grow(stride * team_.size());
  for (int i = 0; i < team_.size(); i++) {
    uint8_t* mine = scratch_.data() + i * stride;
    team_.scratch(i).rows = mine, team_.scratch(i).floats = reinterpret_cast<float*>(mine + own);
  }
  context_.plan = &plan, context_.workspace = workspace_.data();
}

void Executable::begin(const StepInputs& in, std::vector<Tap> taps, double* seconds) {
  check(in);
  const double start = now();
  context_.in = in, taps_ = std::move(taps), seconds_ = seconds, segment_ = 0;
  std::vector<int64_t> key = this->key(seconds != nullptr);
  Plan* plan = cache_.find(key);
  if (!plan) {
    plan_ = nullptr;
    plan = cache_.keep(make_plan(std::move(key), seconds != nullptr));
    plans_++;
  }
  if (plan != plan_) use(*plan);
  plan_ = plan;
  planning_seconds_ += now() - start;
}

int Executable::advance() {
  if (!plan_ || segment_ >= plan_->segments.size()) throw std::logic_error("advance() without a step: call begin() first");
  PhaseList& list = plan_->segments[segment_];
  double before = now();
  team_.run(list);
  for (size_t i = 0; seconds_ && i < list.size(); i++) {
    if (list[i].op >= 0) seconds_[list[i].op] += list.finished(i) - before;
    before = list.finished(i);
  }
  if (communicator_ && segment_ == stops_.size()) communicator_->flush("the end of the step");
  return segment_ < stops_.size() ? stops_[segment_++] : (segment_++, int(ops_.size()));
}

void Executable::copy_out(int tensor, int64_t rows, void* out) const {
  const Tensor& t = tensors_.at(size_t(tensor));
  for (int64_t r = 0; r < rows; r++) std::memcpy(static_cast<float*>(out) + r * t.cols, t.row(r), size_t(t.cols) * 4);
}

void Executable::copy_in(int tensor, int64_t rows, const void* from) {
  const Tensor& t = tensors_.at(size_t(tensor));
  for (int64_t r = 0; r < rows; r++) std::memcpy(t.row(r), static_cast<const float*>(from) + r * t.cols, size_t(t.cols) * 4);
}

void Executable::TapCopy::run(int part, int64_t begin, int64_t, Scratch&) {
  const Tap& tap = of_.taps_[size_t(part)];
  if (begin == 0) of_.copy_out(tap.tensor, of_.tensors_[size_t(tap.tensor)].rows(), tap.out);
}

}  // namespace intaglio
