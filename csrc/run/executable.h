// Executable: a Program as native ops over a table of tensors, run by a thread pool. A step runs to its end, or returns at
// each stop: an op that its caller executes (a collective, or an op whose kernel is written in Python).
#pragma once
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "run/op.h"

namespace intaglio {

// A tensor to copy to `out` after op number `op`.
struct Tap {
  int op, tensor;
  float* out;
};

class Executable {
 public:
  Executable(const Kernels& kernels, int threads, int page, const Limits& limits);

  // Each returns the number of what it adds: of the buffer, or of the tensor.
  int add_buffer(int64_t row_bytes, Extent rows);
  int add_columns(int buffer, int64_t cols, int64_t ld, int64_t column);
  int add_vector(std::vector<float> values);
  int add_weight(std::shared_ptr<PackedWeight> weight, std::vector<int64_t> shape);
  int add_states(int64_t slots, int64_t floats);
  // The caches and states added from now on lie in this file, one after another, which outlives the process: what an earlier
  // one with the same caches wrote is still there. The caller closes the file. -1: in memory of this process.
  void keep_caches_in(int file) { cache_file_ = file; }
  int add_cache(int64_t pages, int heads, int head_dim, Fmt format, bool keys, bool windowed = false, int rows = 0);  // rows of a page; 0: its tokens
  // Adds an op of a kind, with operands (tensor numbers) and attributes by name; returns its number. Throws
  // invalid_argument for an unknown kind, operand or attribute.
  int add_op(const std::string& kind, const std::map<std::string, int>& operands, std::map<std::string, Attribute> attributes);
  int add_stop();
  // Makes this one rank of a group, before its collectives are added.
  void join(std::shared_ptr<Communicator> communicator);

  // Begins a step, with the cached plan of a batch of the same sizes or a new one. The memory that `in`, `taps` and
  // `seconds` point to must live until the step has ended. If `seconds` is not null, the time of each op is added to its
  // item. Throws out_of_range for a batch beyond the limits.
  void begin(const StepInputs& in, std::vector<Tap> taps, double* seconds);
  // Runs the ops up to the next stop; returns the stop's op number or, at the end of the step, the number of ops. Throws
  // what an op throws, such as CommunicatorError; the step has then ended.
  int advance();
  // Copy `rows` rows of a tensor's 4-byte values, between two calls of advance().
  void copy_out(int tensor, int64_t rows, void* out) const;
  void copy_in(int tensor, int64_t rows, const void* from);

  // The contents of pages of K/V cache, all caches in the order in which they were added, as they lie in memory.
  // page_bytes() is their size. Not during a step. Throw out_of_range for a page that is not there.
  int64_t page_bytes() const;
  std::vector<int64_t> page_parts() const;  // bytes of each cache in a page; of each, heads lie one after the other
  void read_page(int64_t page, uint8_t* out) const;
  void write_page(int64_t page, const uint8_t* from);

  // Op number `op`, which has experts: see OpKernel. Not during a step. Throw out_of_range or invalid_argument for others.
  const std::vector<int64_t>& expert_tokens(int op) const;
  void place_experts(int op, const std::vector<int64_t>& held, const std::vector<int64_t>& copy, const std::vector<int64_t>& copies);
  // Replaces the values of a vector by as many others. Not during a step.
  void set_vector(int tensor, const std::vector<float>& values);

  // Number of plans made, and total seconds spent on making and finding plans.
  int64_t plans() const { return plans_; }
  double planning_seconds() const { return planning_seconds_; }

 private:
  class TapCopy : public Work {
   public:
    explicit TapCopy(const Executable& of) : of_(of) {}
    void run(int part, int64_t begin, int64_t end, Scratch& mine) override;

   private:
    const Executable& of_;
  };

  int add(Tensor t);
  void check_page(int64_t page) const;
  Memory part_of_cache_file(int64_t bytes);
  void check(const StepInputs& in) const;
  std::vector<int64_t> key(bool timed) const;
  std::unique_ptr<Plan> make_plan(std::vector<int64_t> key, bool timed);
  void use(const Plan& plan);

  Limits limits_;
  std::deque<Buffer> buffers_;  // ops keep references into these
  std::deque<Tensor> tensors_;
  std::vector<std::unique_ptr<Shared>> shared_;
  std::vector<std::unique_ptr<OpKernel>> ops_;  // null at a stop
  std::vector<int> stops_;
  std::vector<Tap> taps_;
  TapCopy tap_copy_{*this};
  std::shared_ptr<Communicator> communicator_;
  Memory arena_, workspace_, scratch_;
  Context context_;
  double* seconds_ = nullptr;
  size_t segment_ = 0;
  Plan* plan_ = nullptr;
  int cache_file_ = -1;
  int64_t cache_end_ = 0;  // in the file
  int64_t plans_ = 0;
  double planning_seconds_ = 0;
  PlanCache cache_{team_};
  Team team_;  // last member, so that its threads stop before anything they use is destroyed
};

}  // namespace intaglio
