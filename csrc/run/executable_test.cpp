// Unit tests of Executable: stops, taps, seconds by op, cached plans, copies of cache pages, and what is refused.
#include "run/executable.h"

#include <numeric>

#include "isa/select.h"
#include "test/check.h"

namespace intaglio {
namespace {

// A batch of sequences with given context lengths, in which every token is 1.
struct Sizes {
  std::vector<int32_t> ones, positions, slots, first_row, q_len, context_len, states, table, rows;
  std::vector<RowSampling> draws;

  Sizes(const std::vector<int32_t>& lengths, const std::vector<int32_t>& contexts) : q_len(lengths), context_len(contexts) {
    for (size_t s = 0; s < lengths.size(); s++) {
      first_row.push_back(int32_t(positions.size()));
      for (int32_t i = 0; i < lengths[s]; i++) positions.push_back(contexts[s] - lengths[s] + i);
      rows.push_back(int32_t(positions.size()) - 1);
    }
    ones.assign(positions.size(), 1), slots.assign(positions.size(), 0), table.assign(lengths.size(), 0), states.assign(lengths.size(), -1), draws.resize(rows.size());
  }
  StepInputs inputs() const {
    return {ones.data(), positions.data(), slots.data(), first_row.data(), q_len.data(), context_len.data(), states.data(), states.data(), table.data(), rows.data(), nullptr, nullptr,
            int64_t(ones.size()), int64_t(q_len.size()), int64_t(rows.size()), 1, draws.data()};
  }
};

constexpr int kWidth = 8;

// A small executable: x = table[token]; a stop; y = x * 2 + x.
struct Small {
  Executable executable;
  int x, y, stop;

  explicit Small(int threads) : executable(*kernels_of("scalar"), threads, 16, {4, 4096, 16, 1}) {
    auto table = std::make_shared<PackedWeight>(format_of("f32"), 4, kWidth, 0, false);
    std::vector<float> values(4 * kWidth);
    std::iota(values.begin(), values.end(), 0.0f);
    table->fill(values.data(), Source::F32, 0, 4, 1, *kernels_of("scalar"));
    const int w = executable.add_weight(table, {4, kWidth});
    x = rows(), y = rows();
    executable.add_op("embed", {{"w", w}, {"out", x}}, {{"scale", 1.0}, {"index", std::string("tokens")}});
    stop = executable.add_stop();
    executable.add_op("map", {{"a", x}, {"out", y}}, {{"expr", std::vector<Token>{"a", 2.0, "*", "a", "+"}}});
  }
  int rows() { return executable.add_columns(executable.add_buffer(kWidth * 4, {false, 0, 1}), kWidth, kWidth, 0); }
};

TEST(a_step_returns_at_a_stop_and_continues) {
  for (int threads : {1, 3}) {
    Small s(threads);
    const Sizes sizes({3, 1}, {3, 9});
    s.executable.begin(sizes.inputs(), {}, nullptr);
    CHECK_EQUAL(s.executable.advance(), s.stop);
    std::vector<float> x(4 * kWidth), y(4 * kWidth);
    s.executable.copy_out(s.x, 4, x.data());
    CHECK_EQUAL(x[3], float(kWidth + 3));
    for (float& v : x) v += 1;
    s.executable.copy_in(s.x, 4, x.data());
    CHECK_EQUAL(s.executable.advance(), 3);
    s.executable.copy_out(s.y, 4, y.data());
    for (size_t i = 0; i < y.size(); i++) CHECK_EQUAL(y[i], 3 * x[i]);
    CHECK_THROWS(std::logic_error, s.executable.advance(), "without a step");
  }
}

TEST(a_tap_copies_the_result_of_its_op) {
  Small s(2);
  const Sizes sizes({2}, {2});
  std::vector<float> tapped(2 * kWidth);
  s.executable.begin(sizes.inputs(), {{0, s.x, tapped.data()}}, nullptr);
  while (s.executable.advance() < 3) {}
  CHECK_EQUAL(tapped[kWidth], float(kWidth));
}

TEST(seconds_are_counted_by_op) {
  Small s(2);
  const Sizes sizes({2}, {2});
  double seconds[3] = {};
  s.executable.begin(sizes.inputs(), {}, seconds);
  while (s.executable.advance() < 3) {}
  CHECK(seconds[0] > 0 && seconds[1] == 0 && seconds[2] > 0);
}

TEST(batches_of_equal_sizes_are_planned_once) {
  Small s(2);
  auto step = [&](const std::vector<int32_t>& lengths, const std::vector<int32_t>& contexts) {
    const Sizes sizes(lengths, contexts);
    s.executable.begin(sizes.inputs(), {}, nullptr);
    while (s.executable.advance() < 3) {}
    return s.executable.plans();
  };
  CHECK_EQUAL(step({1, 1}, {5, 9}), 1);
  CHECK_EQUAL(step({1, 1}, {6, 10}), 1);
  CHECK_EQUAL(step({1, 1, 1}, {6, 10, 1}), 2);
  CHECK_EQUAL(step({1, 1}, {7, 11}), 2);
  for (int32_t n = 4; n < 4 + int32_t(PlanCache::kMost); n++) step({n}, {n});
  CHECK_EQUAL(step({1, 1}, {7, 11}), int64_t(PlanCache::kMost) + 3);  // the first plans were evicted
}

TEST(attention_needs_a_new_plan_when_its_splits_change) {
  Executable e(*kernels_of("scalar"), 2, 16, {4, 4096, 16 * 64, 64});
  auto rows = [&](int64_t columns) { return e.add_columns(e.add_buffer(columns * 4, {false, 0, 1}), columns, columns, 0); };
  const int k = e.add_cache(64, 2, 4, Fmt::F32, true), v = e.add_cache(64, 2, 4, Fmt::F32, false), q = rows(16), out = rows(16);
  const std::map<std::string, Attribute> attributes = {{"heads", int64_t(4)}, {"scale", 0.5}, {"window", int64_t(0)}, {"chunk", int64_t(0)},
                                                       {"softcap", 0.0}, {"temper", 0.0}, {"temper_every", int64_t(1)}, {"temper_from", int64_t(1)}};
  for (int i = 0; i < 3; i++) e.add_op("attend", {{"q", q}, {"k_cache", k}, {"v_cache", v}, {"out", out}}, attributes);
  auto step = [&](int32_t length, int32_t context) {
    Sizes sizes({length}, {context});
    sizes.table.assign(64, 0);
    StepInputs in = sizes.inputs();
    in.table_width = 64;
    e.begin(in, {}, nullptr);
    e.advance();
    return e.plans();
  };
  CHECK_EQUAL(step(1, 511), 1);
  CHECK_EQUAL(step(1, 512), 1);
  CHECK_EQUAL(step(1, 513), 2);
  CHECK_EQUAL(step(1, 1000), 2);
  CHECK_EQUAL(step(1, 100), 2);
  CHECK_EQUAL(step(300, 400), 3);
  CHECK_EQUAL(step(300, 1000), 3);  // divided by queries, so positions do not matter
}

TEST(pages_of_all_caches_are_copied_out_and_in) {
  Executable e(*kernels_of("scalar"), 1, 16, {4, 64, 16 * 3, 3}), other(*kernels_of("scalar"), 1, 16, {4, 64, 16 * 3, 3});
  for (Executable* x : {&e, &other}) x->add_cache(3, 2, 8, Fmt::F32, true), x->add_cache(3, 2, 8, Fmt::I8, false);
  const int64_t bytes = 2 * 16 * 8 * 4 + 2 * 16 * (16 + 2);  // of values a token are stored 16, and a scale
  CHECK_EQUAL(e.page_bytes(), bytes);
  for (int64_t page = 0; page < 3; page++) {
    std::vector<uint8_t> values(size_t(bytes), uint8_t(page + 1)), read(size_t(bytes), uint8_t(0));
    for (size_t i = 0; i < values.size(); i++) values[i] = uint8_t(values[i] * 31 + i);
    e.write_page(page, values.data());
    e.read_page(page, read.data());
    CHECK(read == values);
    other.write_page(2 - page, read.data());
  }
  for (int64_t page = 0; page < 3; page++) {
    std::vector<uint8_t> a(size_t(bytes), uint8_t(0)), b(size_t(bytes), uint8_t(0));
    e.read_page(page, a.data());
    other.read_page(2 - page, b.data());
    CHECK(a == b);
  }
  std::vector<uint8_t> any(size_t(bytes), uint8_t(0));
  CHECK_THROWS(std::out_of_range, e.read_page(3, any.data()), "page 3 is outside 0..2");
  CHECK_THROWS(std::out_of_range, e.write_page(-1, any.data()), "page -1 is outside 0..2");
}

TEST(batches_beyond_the_limits_are_refused) {
  Small s(1);
  Sizes sizes({1}, {1});
  sizes.ones[0] = 4;
  CHECK_THROWS(std::out_of_range, s.executable.begin(sizes.inputs(), {}, nullptr), "token id");
  sizes.ones[0] = 0, sizes.positions[0] = 4096;
  CHECK_THROWS(std::out_of_range, s.executable.begin(sizes.inputs(), {}, nullptr), "position");
  sizes.positions[0] = 0, sizes.rows[0] = 1;
  CHECK_THROWS(std::out_of_range, s.executable.begin(sizes.inputs(), {}, nullptr), "row");
}

TEST(unknown_operands_and_attributes_are_refused) {
  Small s(1);
  CHECK_THROWS(std::invalid_argument, s.executable.add_op("none", {}, {}), "no kernel for op none");
  CHECK_THROWS(std::invalid_argument, s.executable.add_op("select", {{"x", s.x}}, {}), "takes out as rows");
  CHECK_THROWS(std::invalid_argument, s.executable.add_op("select", {{"x", s.x}, {"out", s.y}}, {{"scale", 1.0}}), "does not know attribute scale");
  CHECK_THROWS(std::invalid_argument, s.executable.add_op("select", {{"x", s.x}, {"out", s.y}, {"z", s.x}}, {}), "does not know operand z");
  CHECK_THROWS(std::invalid_argument, s.executable.add_op("embed", {{"w", s.x}, {"out", s.y}}, {{"scale", 1.0}, {"index", std::string("tokens")}}), "takes w as a packed weight");
}

}  // namespace
}  // namespace intaglio
