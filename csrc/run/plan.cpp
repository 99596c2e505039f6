// Planner: adds an op's phases to a plan. PlanCache: keeps the plans that were used last.
#include "run/plan.h"

#include <algorithm>

namespace intaglio {

namespace {
constexpr int64_t kFewValues = 8192;  // one thread processes them in about 2 us, before a second could have started
}  // namespace

Planner::Planner(const Context& context, bool timed, Plan& plan) : context_(context), timed_(timed), plan_(plan) {
  plan_.floats = kFloats;
  stop();
}

void Planner::single(int part) {
  if (!plan_.segments.back().append(*work_, op_, part, 1)) phase(part, 1, 1);
}

void Planner::rows(int64_t rows, int64_t width, int64_t chunk) {
  const bool few = rows == 1 || rows * width <= kFewValues;
  if (!few || !plan_.segments.back().append(*work_, op_, 0, rows)) phase(0, rows, chunk);
}

Plan* PlanCache::find(const std::vector<int64_t>& key) {
  auto at = std::find_if(plans_.begin(), plans_.end(), [&](const auto& plan) { return plan->key == key; });
  if (at == plans_.end()) return nullptr;
  std::rotate(plans_.begin(), at, at + 1);
  return plans_.front().get();
}

Plan* PlanCache::keep(std::unique_ptr<Plan> plan) {
  if (plans_.size() == kMost) {
    for (const PhaseList& list : plans_.back()->segments) team_.wait_until_left(list);
    plans_.pop_back();
  }
  plans_.insert(plans_.begin(), std::move(plan));
  return plans_.front().get();
}

}  // namespace intaglio
