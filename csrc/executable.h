// A Program made native: a list of ops over a table of tensors, run whole by a team of threads in one call.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "pack.h"
#include "threads.h"

namespace intaglio {

// A weight image and the memory it stands in, maybe beside others; shared by executables.
struct PackedWeight {
  Weight w;
  std::shared_ptr<Memory> memory;
  int64_t bytes() const { return w.panels * w.panel_bytes; }
  PackedWeight(const Format& format, int64_t n, int64_t k, int64_t group, bool glu);
  void fill(const void* rows, Source type, int64_t first, int64_t count, int threads, const Kernels& kernels);
  void fill_codes(const CodedRows& rows, int64_t first, int64_t count, int threads);
  template <class Pack>
  void share(int64_t first, int64_t count, int threads, Pack pack);  // pack(begin panel, end panel) in parallel
  void place(std::shared_ptr<Memory> region, int64_t offset);  // stands there from now on, whatever is there
};

// An exchange is done outside, between two steps.
enum class Kind : int { Embed, Select, Permute, Norm, Linear, Rope, KvWrite, Attend, Map, Sample, Route, Experts, HeadLinear, Exchange };

// How many rows a buffer has in a step: those sampled, or the share-th of `shares` near-equal runs of the tokens.
struct Extent {
  bool sampled;
  int64_t share, shares;
  int64_t of(int64_t t, int64_t r) const { return sampled ? r : up_to(share + 1, t) - up_to(share, t); }
  int64_t up_to(int64_t i, int64_t t) const { return (t * i + shares - 1) / shares; }
};

struct Buffer {
  int64_t row_bytes;
  Extent rows;
  int64_t offset;  // into the arena, set each step
};

struct Tensor {  // exactly one of: a range of a buffer's columns, a vector, a weight, a cache, an input
  int buffer = -1;
  int64_t cols = 0, ld = 0, column = 0;
  std::vector<float> vector;
  std::shared_ptr<PackedWeight> weight;
  std::unique_ptr<Memory> cache;
  Fmt format = Fmt::F32;  // of a cache
  int heads = 0, head_dim = 0, stride = 0;
  bool keys = false;  // a cache laid out as keys: [head_dim][page]
};

struct Op {
  Kind kind;
  std::vector<int> tensors;  // operands then results, in the order run() reads them; -1: none
  std::vector<int64_t> ints;
  std::vector<double> floats;
  std::vector<int32_t> code;    // map
  std::vector<float> numbers;   // map
  int table = -1, plan = -1;    // rope, attend
};

struct StepInputs {
  const int32_t *tokens, *positions, *slots, *first_row, *q_len, *context_len, *block_table, *rows;
  int64_t t, s, r, table_width;
  const Draw* draws;
};

// What token ids, positions, slots and blocks of a batch stay below.
struct Limits {
  int64_t token, position, slot, block;
};

struct Tap {
  int op, tensor;
  float* out;
};

// What an experts op works on: gate and up as one weight of pairs, down; matrices of the stacks begin at whole units.
struct ExpertsView {
  const Weight *up, *down;
  int64_t experts, inner, n, up_units, down_units, top;
  bool x_bf16;
};

// Lays out `rows` prepared rows for a weight at `at`; returns the bytes they take.
int64_t lay_rows(const Weight& w, bool x_bf16, int64_t rows, uint8_t* at, Rows* out);
void grow(Memory& m, int64_t bytes);

class Executable {
 public:
  Executable(const Kernels* kernels, int threads, int page, const Limits& limits);

  int add_buffer(int64_t row_bytes, Extent rows);
  int add_tensor(Tensor t);
  void add_op(Op op);
  // Runs ops first..last - 1 of one step, which begins with op 0; results are read from buffers afterwards by copy_out().
  // `seconds`, if not null, gets one a op. Throws out_of_range for a batch beyond the limits.
  void step(const StepInputs& in, const std::vector<Tap>& taps, double* seconds, int first, int last);
  void copy_out(int tensor, int64_t rows, void* out) const;
  void copy_in(int tensor, int64_t rows, const void* from);
  Tensor make_cache(int64_t pages, int heads, int head_dim, Fmt format, bool keys) const;

 private:
  struct Scratch {  // one thread's memory, and the phase whose rows of x it holds
    float* floats;
    uint8_t* x;
    const Phase* holds;
  };
  struct RopeTable {
    int frequencies;
    float factor;
    int op;  // the first that reads it, whose time it is
    std::vector<float> cosines, sines;  // [T, pairs]
  };
  struct Task {
    int seq, token, tokens, kv_head, first_split, end_split;
    int64_t partial;  // where its one split's result goes, or -1: merge and store at once
  };
  struct Merge {
    int seq, kv_head, splits;
    int64_t partial;
  };
  struct AttendPlan {
    int kv_heads, share, v_stride;
    Reach reach;
    std::vector<Task> tasks;
    std::vector<Merge> merges;
    int64_t partials;
  };

  struct Active {  // an expert that has tokens in this step
    int64_t expert, first, rows;  // its entries
    int64_t x, rounded;           // where its prepared rows begin, in bytes
    int64_t before, cost;         // what the experts before it cost, and what a unit of this one does
  };
  struct Sorted {  // the tokens of a step by expert: the memory of one experts op after the other
    std::vector<int32_t> start, entry, token;  // first entry of an expert; entry of (token, j), and back
    std::vector<Active> active;
    int64_t cost;
    Memory x, inner, rounded, out;
  };

  void check(const StepInputs& in) const;
  void plan_memory();
  void plan_phases(bool timed, int first, int last);
  void plan_attend(AttendPlan& p);
  int64_t rows_of(const Tensor& t) const;
  int64_t rows_of(const Op& op) const;
  int64_t width_of(const Op& op) const;
  bool alone(const Op& op) const;
  float* rows_at(int tensor) const;
  const float* vector_at(int tensor) const;

  void run(Scratch& mine, const Phase& phase, int64_t begin, int64_t end);
  void fetch_ahead(int thread, const Phase& coming, int64_t turn) const;
  void run_op(Scratch& mine, const Op& op, int64_t begin, int64_t end);
  void sample(const Op& op, int64_t r);
  void table_row(RopeTable& table, int64_t t);
  void embed(const Op& op, int64_t t);
  void select(const Op& op, int64_t r);
  void permute(const Op& op, int64_t r);
  void rope(const Op& op, int64_t t);
  void kv_write(const Op& op, int64_t t);
  NormArgs norm_args(const Op& op) const;
  MapArgs map_args(const Op& op) const;
  LinearArgs linear_args(const Op& op, uint8_t* x) const;
  void prepare(const LinearArgs& a, const Op& op, int64_t begin, int64_t end) const;
  void product(Scratch& mine, const Phase& phase, const Op& op, int64_t begin, int64_t end);
  void attend_task(Scratch& mine, const Op& op, const Task& t);
  void attend_merge(Scratch& mine, const Op& op, const Merge& m);
  void finish_attend(const AttendArgs& a, const Query& q, const float* top, const float* total, const float* acc) const;
  AttendArgs attend_args(const Op& op) const;
  RouteArgs route_args(const Op& op) const;
  ExpertsView experts_view(const Op& op) const;
  void plan_experts(const Op& op);
  void add_experts(int at, const Op& op);
  void sort_tokens(const Op& op);
  const Active& active_of(int64_t entry) const;
  template <class Fn>
  void each_unit(int64_t slice, int64_t units, Fn f) const;
  void run_experts(Scratch& mine, const Op& op, int part, int64_t begin, int64_t end);
  void expert_row(Scratch& mine, const Op& op, int64_t entry);
  void expert_inner(Scratch& mine, const Op& op, int64_t slice);
  void round_inner(Scratch& mine, const Op& op, int64_t entry);
  void expert_outer(Scratch& mine, const Op& op, int64_t slice);
  void combine(const Op& op, int64_t t);
  void add_heads(int at, const Op& op);
  void run_heads(Scratch& mine, const Op& op, int part, int64_t begin, int64_t end);
  Query query(const Task& t) const;

  const Kernels* kernels_;
  int page_;
  Limits limits_;
  int64_t planned_t_ = -1, planned_r_ = -1;  // rows that the memory was planned for
  std::vector<int64_t> planned_;             // all that the phases follow from
  std::vector<Buffer> buffers_;
  std::vector<Tensor> tensors_;
  std::vector<Op> ops_;
  std::vector<RopeTable> tables_;
  std::vector<AttendPlan> plans_;
  StepInputs in_{};
  Memory arena_, prepared_, scratch_, partials_;
  Sorted sorted_;
  std::vector<Scratch> scratches_;
  std::vector<Tap> taps_;
  Team team_;  // last: its threads stop before anything they use goes
};

}  // namespace intaglio
