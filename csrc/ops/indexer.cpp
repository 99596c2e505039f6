// Op choose_keys: the positions or pooled entries that each token attends to, by the scores of an indexer.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "ops/sequences.h"
#include "run/op.h"

namespace intaglio {
namespace {

// A task for each token.
class ChooseKeys : public OpKernel {
 public:
  explicit ChooseKeys(OpArgs& a)
      : context_(a.context), q_(a.rows("q")), weights_(a.rows("weights")), chosen_(a.rows("chosen")), cache_(a.cache("cache")),
        heads_(int(a.integer("heads"))), top_(a.integer("top")), every_(a.integer("every")), scale_(a.number("scale")) {}
  void plan(Planner& p) override { p.phase(0, p.in().t, 1); }
  void run(int, int64_t begin, int64_t end, Scratch&) override {
    const StepInputs& in = context_.in;
    std::vector<float> scores;    // as long as the context, which a plan does not know
    std::vector<int32_t> places;
    for (int64_t t = begin; t < end; t++) {
      choose(t, blocks_of(in, cache_, sequence_of(in, t)), (in.positions[t] + 1) / every_, scores, places);
    }
  }

 private:
  // Scores of a sequence's first `seen` entries (see ops/pooled.py), copied to one page of kCopied entries after another.
  void score_entries(int64_t t, const int32_t* blocks, int64_t seen, std::vector<float>& scores) const {
    constexpr int64_t kCopied = 64;
    const int64_t size = cache_bytes(cache_.format), page = context_.page;
    std::vector<uint8_t> copy(size_t(kCopied * cache_.head_dim * size));
    scores.resize(size_t((seen + kCopied - 1) / kCopied * kCopied));
    const IndexArgs a{copy.data(), cache_.format, heads_, cache_.head_dim, kCopied, scale_};
    for (int64_t first = 0; first < seen; first += kCopied) {
      const int64_t count = std::min(kCopied, seen - first);
      for (int64_t i = 0; i < count; i++) {
        const int64_t last = (first + i + 1) * every_ - 1;
        const uint8_t* from = cache_.memory.data() + blocks[last / page] * cache_.head_bytes() + last % page / every_ * size;
        for (int64_t d = 0; d < cache_.head_dim; d++) std::memcpy(copy.data() + (d * kCopied + i) * size, from + d * cache_.rows * size, size_t(size));
      }
      const int32_t only = 0;
      context_.kernels.score_keys(a, &only, q_.row(t), weights_.row(t), count, scores.data() + first);
    }
  }
  // Writes the positions chosen for token t, which sees `seen` of them.
  void choose(int64_t t, const int32_t* blocks, int64_t seen, std::vector<float>& scores, std::vector<int32_t>& places) const {
    int32_t *out = chosen_.integers(t), *first = out + std::max<int64_t>(0, top_ - seen);
    std::fill(out, first, -1);
    if (seen <= top_) return std::iota(first, out + top_, 0);
    if (every_ > 1) {
      score_entries(t, blocks, seen, scores);
    } else {
      scores.resize(size_t((seen + context_.page - 1) / context_.page * context_.page));
      const IndexArgs a{cache_.memory.data(), cache_.format, heads_, cache_.head_dim, context_.page, scale_};
      context_.kernels.score_keys(a, blocks, q_.row(t), weights_.row(t), seen, scores.data());
    }
    for (int64_t i = 0; i < seen; i++)
      if (std::isnan(scores[size_t(i)])) scores[size_t(i)] = -INFINITY;
    places.resize(size_t(seen));
    std::iota(places.begin(), places.end(), 0);
    std::nth_element(places.begin(), places.begin() + top_, places.end(), [&](int32_t x, int32_t y) {
      const float a = scores[size_t(x)], b = scores[size_t(y)];
      return a != b ? a > b : x < y;
    });
    std::copy(places.begin(), places.begin() + top_, out);
    std::sort(out, out + top_);
  }

  const Context& context_;
  const Tensor &q_, &weights_, &chosen_;
  const Cache& cache_;
  int heads_;
  int64_t top_, every_;
  float scale_;
};

const Registered<ChooseKeys> choose_keys("choose_keys");

}  // namespace
}  // namespace intaglio
