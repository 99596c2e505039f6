// Loops over the ops of one modelled step, too many for Python: exposed time of collectives, and ends of ops with prefetch.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

namespace intaglio {

// A step's ops refer to distinct kernels by number: op i runs kernel numbers[i].
using Numbers = std::vector<int32_t>;

// Seconds of each op in which no compute hides it: 0 for compute, the exposed time for collectives, with two halves of a batch
// that alternate. first, second: seconds of each kernel in either half. collective: whether a kernel is a collective.
std::vector<double> exposed_seconds(const Numbers& numbers, const std::vector<double>& first, const std::vector<double>& second,
                                    const std::vector<bool>& collective);

// (end of each op in seconds, whether it waited for its weights), if HBM delivers the weights of later ops while earlier ones run.
// seconds: of each op. weights, others: seconds in which HBM delivers each kernel's weights, or its other bytes.
// ahead: weights arrive at most so many seconds before their op.
std::pair<std::vector<double>, std::vector<bool>> prefetched_ends(const Numbers& numbers, const std::vector<double>& seconds,
                                                                  const std::vector<double>& weights,
                                                                  const std::vector<double>& others, double ahead);

}  // namespace intaglio
