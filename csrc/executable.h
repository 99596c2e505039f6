// A Program made native: a list of ops over a table of tensors, run whole by a team of threads in one call.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "pack.h"
#include "threads.h"

namespace intaglio {

// A weight image and the memory it stands in; shared by executables.
struct PackedWeight {
  Weight w;
  Memory memory;
  PackedWeight(Fmt fmt, bool row, int64_t n, int64_t k, int64_t group, bool glu);
  void fill(const void* rows, Source type, int64_t first, int64_t count, int threads);
  void map(int file, int64_t offset, bool writable);  // its memory is this range of a file from now on
};

enum class Kind : int { Embed, Select, Norm, Linear, Rope, KvWrite, Attend, Map, Sample, Exchange };  // an exchange is done outside, between two steps
enum class Extent : int { T, R };  // how many rows a buffer has in a step

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

struct Tap {
  int op, tensor;
  float* out;
};

class Executable {
 public:
  Executable(const Kernels* kernels, int threads, int page);

  int add_buffer(int64_t row_bytes, Extent rows);
  int add_tensor(Tensor t);
  void add_op(Op op);
  // Runs ops first..last - 1 of one step, which begins with op 0; results are read from buffers afterwards by copy_out().
  // `seconds`, if not null, gets one a op.
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
    int kv_heads, share, v_stride, window;
    std::vector<Task> tasks;
    std::vector<Merge> merges;
    int64_t partials;
  };

  void plan_memory();
  void plan_phases(const std::vector<Tap>& taps, bool timed, int first, int last);
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
  void rope(const Op& op, int64_t t);
  void kv_write(const Op& op, int64_t t);
  NormArgs norm_args(const Op& op) const;
  MapArgs map_args(const Op& op) const;
  LinearArgs linear_args(const Op& op, uint8_t* x) const;
  void prepare(const LinearArgs& a, const Op& op, int64_t begin, int64_t end) const;
  void product(Scratch& mine, const Phase& phase, const Op& op, int64_t begin, int64_t end);
  void attend_task(Scratch& mine, const Op& op, const Task& t);
  void attend_merge(Scratch& mine, const Op& op, const Merge& m);
  void finish_attend(const AttendArgs& a, const Query& q, const float* total, const float* acc) const;
  AttendArgs attend_args(const Op& op) const;
  Query query(const Task& t) const;

  const Kernels* kernels_;
  int page_;
  std::vector<Buffer> buffers_;
  std::vector<Tensor> tensors_;
  std::vector<Op> ops_;
  std::vector<RopeTable> tables_;
  std::vector<AttendPlan> plans_;
  StepInputs in_{};
  Memory arena_, prepared_, scratch_, partials_;
  std::vector<Scratch> scratches_;
  std::vector<Tap> taps_;
  Team team_;  // last: its threads stop before anything they use goes
};

}  // namespace intaglio
