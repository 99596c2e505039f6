// Exposed time of collectives with two half batches, and end times of ops whose weights are prefetched.
#include "timeline/timeline.h"

#include <algorithm>
#include <stdexcept>

namespace intaglio {
namespace {

void check(const Numbers& numbers, size_t kernels) {
  for (int32_t n : numbers)
    if (n < 0 || size_t(n) >= kernels) throw std::invalid_argument("an op's kernel number is out of range");
}

}  // namespace

std::vector<double> exposed_seconds(const Numbers& numbers, const std::vector<double>& first, const std::vector<double>& second,
                                    const std::vector<bool>& collective) {
  const size_t n = numbers.size(), kernels = first.size();
  if (second.size() != kernels || collective.size() != kernels)
    throw std::invalid_argument("exposed_seconds() needs the seconds of both halves for every kernel");
  check(numbers, kernels);
  std::vector<double> first_left(n + 1), second_left(n + 1);  // seconds of compute from an op to the next collective
  for (size_t i = n; i-- > 0;) {
    const size_t k = size_t(numbers[i]);
    if (collective[k]) continue;
    first_left[i] = first[k] + first_left[i + 1];
    second_left[i] = second[k] + second_left[i + 1];
  }
  std::vector<double> exposed(n);
  size_t a = 0, b = 0;                // the next op of the first and of the second half
  double a_ready = 0, b_ready = 0;    // when they can start
  ptrdiff_t a_last = -1, b_last = -1;  // last collective of each half
  double compute_free = 0, links_free = 0;
  while (b < n) {
    bool is_second = a == n;
    if (b < a && a < n) {
      const double a_start = std::max(a_ready, collective[size_t(numbers[a])] ? links_free : compute_free);
      const double b_start = std::max(b_ready, collective[size_t(numbers[b])] ? links_free : compute_free);
      is_second = b_start < a_start || (b_start == a_start && second_left[b] < first_left[a]);
    }
    const size_t i = is_second ? b : a, k = size_t(numbers[i]);
    ptrdiff_t& last = is_second ? b_last : a_last;
    const double start = std::max(is_second ? b_ready : a_ready, collective[k] ? links_free : compute_free);
    const double end = start + (is_second ? second : first)[k];
    if (collective[k]) {
      last = ptrdiff_t(i);
      links_free = end;
    } else {
      if (last >= 0) exposed[size_t(last)] += start - compute_free;
      compute_free = end;
    }
    (is_second ? b_ready : a_ready) = end;
    ++(is_second ? b : a);
  }
  if (b_last >= 0) exposed[size_t(b_last)] += std::max(0.0, b_ready - compute_free);
  return exposed;
}

std::pair<std::vector<double>, std::vector<bool>> prefetched_ends(const Numbers& numbers, const std::vector<double>& seconds,
                                                                  const std::vector<double>& weights,
                                                                  const std::vector<double>& others, double ahead) {
  const size_t n = numbers.size();
  if (seconds.size() != n || weights.size() != others.size())
    throw std::invalid_argument("prefetched_ends() needs the seconds of every op, and of weights and other bytes of every kernel");
  check(numbers, weights.size());
  std::vector<double> ends(n);
  std::vector<bool> stalled(n);
  double now = 0, fetched_at = 0;  // fetched_at: when HBM has delivered all that was requested so far
  for (size_t i = 0; i < n; ++i) {
    const size_t k = size_t(numbers[i]);
    double end = now + seconds[i];
    if (weights[k] != 0) {
      fetched_at = std::max(fetched_at, now - ahead) + weights[k];
      stalled[i] = fetched_at > end;
      if (stalled[i]) end = fetched_at;
    } else if (others[k] != 0) {
      fetched_at = std::max(fetched_at, now) + others[k];
    }
    ends[i] = now = end;
  }
  return {ends, stalled};
}

}  // namespace intaglio
