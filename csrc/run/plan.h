// Plan: the phases and memory of one step. It depends only on the sizes of a batch, so it is cached and used again for
// batches of the same sizes. Planner builds one; PlanCache keeps the last few. Shared: work that several ops share.
#pragma once
#include <algorithm>
#include <any>
#include <deque>
#include <memory>
#include <vector>

#include "run/team.h"
#include "run/tensor.h"

namespace intaglio {

class Communicator;
struct Plan;

// State that all ops of an executable share. `in` and `plan` are those of the current step.
struct Context {
  const Kernels& kernels;
  int threads, page;  // page: tokens in a K/V page
  StepInputs in{};
  const Plan* plan = nullptr;
  Communicator* communicator = nullptr;  // of the rank that the executable is; null: collectives are stops
  uint8_t* workspace = nullptr;  // scratch memory of the op that runs; its contents do not survive the op
};

class Planner;

// Work that several ops share, done once a step before them: rope tables, the tasks of attention.
class Shared {
 public:
  virtual ~Shared() = default;
  // True if both compute the same, so that ops can share one of them.
  virtual bool same_as(const Shared& other) const = 0;
  // Appends to the plan's key all that plan() depends on, except the numbers of tokens, sequences and rows to sample.
  virtual void add_key(const StepInputs& /*in*/, std::vector<int64_t>& /*key*/) const {}
  // Adds phases, and returns the data that its ops read from the plan (may be empty).
  virtual std::any plan(Planner& p) = 0;

  int first_op = 0;   // the first op that shares it; its phases are timed as that op's
  size_t number = 0;  // index in the executable's list of shared work
};

struct Plan {
  std::vector<int64_t> key;
  std::vector<int64_t> offsets;  // of the buffers in the arena, bytes
  int64_t arena = 0, workspace = 0;    // bytes
  int64_t floats = 0, own_rows = 0;    // of each thread's Scratch: number of floats, bytes of rows
  std::deque<PhaseList> segments;      // one for the ops up to each stop
  std::vector<std::any> shared;        // returned by Shared::plan()

  template <class T>
  const T& of(const Shared& what) const {
    return *std::any_cast<T>(&shared[what.number]);
  }
};

// Floats of a thread's scratch that every op may use without a request.
constexpr int64_t kFloats = kPanels * kRows * kPanel;

// Builds a plan: each op adds its phases and requests memory.
class Planner {
 public:
  Planner(const Context& context, bool timed, Plan& plan);

  const StepInputs& in() const { return context_.in; }
  const Plan& plan() const { return plan_; }
  int threads() const { return context_.threads; }
  // Tasks that a thread takes at a time: a quarter of its equal part of `tasks`, at least 1.
  int64_t chunk(int64_t tasks) const { return std::max<int64_t>(1, tasks / (4 * threads())); }

  // Sets the work that phases added from now on do, and the op as whose time they count. tapped: the step copies its results.
  void begin(Work* work, int op, bool tapped = false) { work_ = work, op_ = op, tapped_ = tapped; }
  bool tapped() const { return tapped_; }
  void phase(int part, int64_t tasks, int64_t chunk) { plan_.segments.back().add(*work_, op_, part, tasks, chunk); }
  // Adds a single task: to the tail of the previous phase if there is one.
  void single(int part);
  // Adds part 0 with one task for each row of `width` values: to the tail of the previous phase if they are few values.
  void rows(int64_t rows, int64_t width, int64_t chunk);
  void rows(int64_t rows, int64_t width) { this->rows(rows, width, chunk(rows)); }
  // Ends a segment: the step returns to its caller before the ops that follow.
  void stop() { plan_.segments.emplace_back(threads(), timed_); }

  // Requests for memory; the plan takes the largest of each.
  void workspace(int64_t bytes) { plan_.workspace = std::max(plan_.workspace, bytes); }
  void floats(int64_t count) { plan_.floats = std::max(plan_.floats, count); }
  void own_rows(int64_t bytes) { plan_.own_rows = std::max(plan_.own_rows, bytes); }

 private:
  const Context& context_;
  bool timed_;
  Plan& plan_;
  Work* work_ = nullptr;
  int op_ = -1;
  bool tapped_ = false;
};

// LRU cache of plans.
class PlanCache {
 public:
  // Few are enough: sizes of mixed prefill and decode steps rarely repeat, and pipeline stages alternate between a few.
  static constexpr size_t kMost = 8;
  explicit PlanCache(Team& team) : team_(team) {}
  // The plan with this key, now the most recently used; null if there is none.
  Plan* find(const std::vector<int64_t>& key);
  // Adds a plan; destroys the least recently used one if there are more than kMost.
  Plan* keep(std::unique_ptr<Plan> plan);
  size_t size() const { return plans_.size(); }

 private:
  Team& team_;
  std::vector<std::unique_ptr<Plan>> plans_;  // most recently used first
};

}  // namespace intaglio
