// Unit tests of Planner and PlanCache: chunks, tails, segments, memory, eviction.
#include "run/plan.h"

#include "isa/select.h"
#include "test/check.h"

namespace intaglio {
namespace {

struct Nothing : Work {
  void run(int, int64_t, int64_t, Scratch&) override {}
};

struct Planned {
  Context context{*kernels_of("scalar"), 4, 16};
  Plan plan;
  Nothing work;
  Planner planner{context, false, plan};
  Planned() { planner.begin(&work, 0); }
  const PhaseList& list() const { return plan.segments.back(); }
};

TEST(a_chunk_of_rows_is_a_quarter_of_a_threads_share) {
  Planned p;
  p.planner.rows(800, 1000);
  CHECK_EQUAL(p.list().size(), size_t(1));
  CHECK_EQUAL(p.list()[0].tasks, 800);
  CHECK_EQUAL(p.list()[0].chunk, 800 / 16);
  CHECK_EQUAL(p.planner.chunk(3), 1);
}

TEST(few_values_go_to_the_tail_of_the_previous_phase) {
  Planned p;
  p.planner.rows(4, 100);  // there is no previous phase
  p.planner.rows(4, 100);
  p.planner.rows(1, 1 << 20);
  p.planner.single(0);
  CHECK_EQUAL(p.list().size(), size_t(1));
  CHECK_EQUAL(p.list()[0].tail_end - p.list()[0].tail, size_t(3));
  p.planner.rows(90, 100);
  CHECK_EQUAL(p.list().size(), size_t(2));
}

TEST(a_stop_begins_a_new_segment) {
  Planned p;
  p.planner.rows(100, 1000);
  p.planner.stop();
  p.planner.rows(1, 1);
  CHECK_EQUAL(p.plan.segments.size(), size_t(2));
  CHECK_EQUAL(p.list().size(), size_t(1));
}

TEST(memory_is_the_largest_request_of_all_ops) {
  Planned p;
  CHECK_EQUAL(p.plan.floats, kFloats);
  p.planner.workspace(100), p.planner.workspace(300), p.planner.workspace(200);
  p.planner.floats(kFloats + 1), p.planner.floats(1), p.planner.own_rows(64);
  CHECK_EQUAL(p.plan.workspace, 300);
  CHECK_EQUAL(p.plan.floats, kFloats + 1);
  CHECK_EQUAL(p.plan.own_rows, 64);
}

TEST(the_least_recently_used_plan_is_evicted) {
  Team team(2);
  PlanCache cache(team);
  auto keep = [&](int64_t key) {
    auto plan = std::make_unique<Plan>();
    plan->key = {key};
    plan->segments.emplace_back(2, false);
    return cache.keep(std::move(plan));
  };
  for (int64_t key = 0; key < int64_t(PlanCache::kMost); key++) keep(key);
  Plan* first = cache.find({0});
  CHECK(first && first->key[0] == 0);
  keep(100);
  CHECK_EQUAL(cache.size(), PlanCache::kMost);
  CHECK(cache.find({0}) == first);  // the second most recently used
  CHECK(!cache.find({1}) && cache.find({2}) && cache.find({100}) && !cache.find({}));
}

}  // namespace
}  // namespace intaglio
