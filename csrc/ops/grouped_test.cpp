// Unit tests of Grouped: rows sorted by matrix, and slices that cover each unit of work once.
#include "ops/grouped.h"

#include <random>
#include <vector>

#include "test/check.h"

namespace intaglio {
namespace {

struct Sorted {
  Grouped grouped;
  std::vector<std::vector<int64_t>> of;  // [token][j]: the matrix of each pair
  Memory memory;

  Sorted(int64_t t, int64_t top, int64_t matrices, int64_t slices, uint32_t seed) : grouped(matrices, top, slices), memory(grouped.bytes(t) + 1) {
    std::mt19937 draw(seed);
    for (int64_t i = 0; i < t; i++) {
      of.emplace_back();
      for (int64_t j = 0; j < top; j++) of.back().push_back(int64_t(draw() % uint32_t(matrices + 1)) - 1);
    }
    CHECK_EQUAL(grouped.place(t, memory.data()), grouped.bytes(t));
    grouped.sort([&](int64_t token, int64_t j) { return of[size_t(token)][size_t(j)]; });
  }
};

TEST(entries_are_sorted_by_matrix_and_token) {
  const Sorted s(29, 3, 7, 4, 1);
  int64_t count = 0, before = -1;
  for (int64_t t = 0; t < 29; t++)
    for (int64_t j = 0; j < 3; j++) {
      const int64_t m = s.of[size_t(t)][size_t(j)], entry = s.grouped.entry(t, j);
      count += m >= 0;
      CHECK_EQUAL(entry < 0, m < 0);
      if (m < 0) continue;
      CHECK_EQUAL(s.grouped.pair(entry), t * 3 + j);
      CHECK_EQUAL(s.grouped.active_of(entry).matrix, m);
    }
  CHECK_EQUAL(s.grouped.entries(), count);
  for (const Active& a : s.grouped) {
    CHECK(a.matrix > before);
    before = a.matrix;
    for (int64_t e = a.first + 1; e < a.first + a.rows; e++) CHECK(s.grouped.pair(e - 1) < s.grouped.pair(e));
  }
}

TEST(slices_cover_every_unit_once) {
  for (uint32_t seed = 0; seed < 20; seed++) {
    const int64_t units = 1 + seed % 5, slices = 1 + seed % 7;
    const Sorted s(1 + seed * 3, 2, 5, slices, seed);
    std::vector<int> seen(size_t(5 * units));
    for (int64_t slice = 0; slice < slices; slice++)
      s.grouped.each_run(slice, units, [&](const Active& a, int64_t first, int64_t count) {
        for (int64_t unit = first; unit < first + count; unit++) seen[size_t(a.matrix * units + unit)]++;
      });
    std::vector<int> wanted(size_t(5 * units));
    for (const Active& a : s.grouped) std::fill_n(wanted.begin() + a.matrix * units, units, 1);
    CHECK(seen == wanted);
  }
}

TEST(no_tokens_or_no_matrices_give_no_units) {
  Grouped grouped(4, 2, 3);
  Memory memory(grouped.bytes(5));
  grouped.place(5, memory.data());
  grouped.sort([](int64_t, int64_t) { return int64_t(-1); });
  CHECK_EQUAL(grouped.entries(), 0);
  CHECK(grouped.begin() == grouped.end());
  for (int64_t slice = 0; slice < 3; slice++) grouped.each_run(slice, 2, [](const Active&, int64_t, int64_t) { CHECK(false); });
}

}  // namespace
}  // namespace intaglio
