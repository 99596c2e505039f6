// Grouped: the plan of a grouped GEMM (mixture of experts). Sorts rows by the matrix that each is multiplied by, and divides
// the products into slices of equal cost.
#pragma once
#include <algorithm>

#include "ops/product.h"

namespace intaglio {

// A matrix that has rows in this step.
struct Active {
  int64_t matrix, first, rows;  // its entries: first .. first + rows - 1
  int64_t at[2];                // byte offset of its prepared rows, for each of two products
  int64_t before, cost;         // cost of one unit of all matrices before it, and of this one
};

// The pairs (token, j), j < top, of t tokens sorted by the matrix of each pair. A sorted pair is called an entry; entries of
// one matrix are consecutive, with tokens ascending.
class Grouped {
 public:
  Grouped(int64_t matrices, int64_t top, int64_t slices) : matrices_(matrices), top_(top), slices_(slices) {}

  // Bytes of memory needed to sort t tokens.
  int64_t bytes(int64_t t) const { return Grouped(*this).place(t, nullptr); }
  // Places the tables for t tokens in memory at `at`; returns their bytes.
  int64_t place(int64_t t, uint8_t* at) {
    int64_t end = 0;
    auto take = [&](auto*& field, int64_t count) {
      field = reinterpret_cast<std::remove_reference_t<decltype(field)>>(reinterpret_cast<uintptr_t>(at) + uintptr_t(end));
      end += aligned(count * int64_t(sizeof *field));
    };
    t_ = t;
    take(start_, matrices_ + 1), take(next_, matrices_), take(entry_, t * top_), take(pair_, t * top_);
    take(active_, std::min(matrices_, t * top_));
    return end;
  }
  // Sorts the pairs; matrix(t, j) returns the matrix of a pair, or -1 for none on this rank.
  template <class Fn>
  void sort(Fn matrix) {
    std::fill(start_, start_ + matrices_ + 1, 0);
    for (int64_t i = 0; i < t_ * top_; i++)
      if (const int64_t m = matrix(i / top_, i % top_); m >= 0) start_[m + 1]++;
    for (int64_t m = 0; m < matrices_; m++) start_[m + 1] += start_[m];
    std::copy(start_, start_ + matrices_, next_);
    for (int64_t i = 0; i < t_ * top_; i++) {
      const int64_t m = matrix(i / top_, i % top_);
      entry_[i] = m < 0 ? -1 : next_[m]++;
      if (m >= 0) pair_[entry_[i]] = int32_t(i);
    }
    active_count_ = cost_ = 0;
    for (int64_t m = 0; m < matrices_; m++) {
      const int64_t rows = start_[m + 1] - start_[m];
      if (!rows) continue;
      const int64_t own = (rows + kCost - 1) / kCost;
      active_[active_count_++] = {m, start_[m], rows, {}, cost_, own};
      cost_ += own;
    }
  }

  int64_t entries() const { return start_[matrices_]; }
  // The entry of a pair, or -1; the pair of an entry, as t * top + j.
  int64_t entry(int64_t t, int64_t j) const { return entry_[t * top_ + j]; }
  int64_t pair(int64_t entry) const { return pair_[entry]; }
  Active* begin() const { return active_; }
  Active* end() const { return active_ + active_count_; }
  const Active& active_of(int64_t entry) const {
    return *(std::upper_bound(begin(), end(), entry, [](int64_t at, const Active& a) { return at < a.first; }) - 1);
  }
  // Calls f(active matrix, first unit, count) for the units of slice number `slice`.
  template <class Fn>
  void each_run(int64_t slice, int64_t units, Fn f) const {
    const int64_t total = cost_ * units, low = total * slice / slices_, high = total * (slice + 1) / slices_;
    for (const Active& a : *this) {
      const int64_t base = a.before * units;
      auto from = [&](int64_t cost) { return std::clamp<int64_t>((cost - base + a.cost - 1) / a.cost, 0, units); };
      if (base + units * a.cost <= low || base >= high) continue;
      const int64_t first = low <= base ? 0 : from(low), end = from(high);
      if (first < end) f(a, first, end - first);
    }
  }

 private:
  static constexpr int64_t kCost = 8;  // rows whose products take about as long as reading the weights once

  int64_t matrices_, top_, slices_, t_ = 0, active_count_ = 0, cost_ = 0;
  int32_t *start_ = nullptr, *next_ = nullptr, *entry_ = nullptr, *pair_ = nullptr;
  Active* active_ = nullptr;
};

}  // namespace intaglio
