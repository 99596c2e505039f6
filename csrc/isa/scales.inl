// Search for the best scales of a quantised group, with the operations of formats.py in the same order, so that the results
// are equal bit for bit. Included by kernels_isa.cpp.
#pragma once

namespace scales {

// Values rounded to integers, ties to even, and clipped to a range.
template <class Vector>
Vector whole(Vector x, float lowest, float highest) {
  const Vector bottom = Vector{} + lowest, top = Vector{} + highest;
  x = x > bottom ? x : bottom;
  x = x < top ? x : top;
  return x + 0x1.8p23f - 0x1.8p23f;
}

// The scale of `tried` with the least sum of squared errors over a group's `count` values (a multiple of 32), the first of
// equals: _searched() in formats.py. Evaluates all scales together, since the sum of one alone is bound by latency.
float choose_scale(const float* x, int64_t count, const float* tried, float lowest, float highest) {
  using Vector = float __attribute__((vector_size(64)));
  constexpr int64_t step = sizeof(Vector) / 4;
  Vector sums[kTried][2] = {};
  float inverse[kTried];
  for (int t = 0; t < kTried; t++) inverse[t] = 1.0f / tried[t];
  for (int64_t i = 0; i < count; i += 2 * step)
    for (int t = 0; t < kTried; t++)
      for (int64_t v = 0; v < 2; v++) {
        Vector own;
        std::memcpy(&own, x + i + v * step, sizeof own);
        own -= whole(own * inverse[t], lowest, highest) * tried[t];
        sums[t][v] += own * own;
      }
  float best = tried[0], least = INFINITY;
  for (int t = 0; t < kTried; t++) {
    float parts[step];
    const Vector sum = sums[t][0] + sums[t][1];
    std::memcpy(parts, &sum, sizeof parts);
    for (int64_t half = step / 2; half; half /= 2)
      for (int64_t j = 0; j < half; j++) parts[j] += parts[j + half];
    best = parts[0] < least ? tried[t] : best;
    least = parts[0] < least ? parts[0] : least;
  }
  return best;
}

// q4_k: see _q4_k() in formats.py for the method. A vector holds one value of each of the eight groups of a block, on every
// instruction set.

constexpr int kValues = 32, kGroups = intaglio::kBlock / kValues;
constexpr float kSteps = 15, kSizes = 63, kLargest = 0x1p20f, kEnds[] = {-1, -0.5f, 0, 0.5f};

using Vector = float __attribute__((vector_size(kGroups * 4)));

Vector quotient(Vector x, Vector y, float least = 0) {  // 0 where y <= least
  return y > least ? x / (y > least ? y : Vector{} + 1) : Vector{};
}

struct Lines {
  Vector scale, minimum, middle;  // middle: mean of the codes
};

Lines lines_of(const Vector* x, Vector mean) {
  Vector low{}, high = x[0], total{}, t[kValues];
  for (int i = 0; i < kValues; i++) low = x[i] < low ? x[i] : low, high = x[i] > high ? x[i] : high;
  const Vector reach = high - low, step = reach / kSteps, inverse = quotient(Vector{} + kSteps, reach, kTiny);
  for (int i = 0; i < kValues; i++) t[i] = (x[i] - low) * inverse, total += t[i];
  const Vector zero = low * inverse, raised = total + kValues * zero;
  Vector best = Vector{} - INFINITY, best_slope{}, best_sum{};
  for (float a : kEnds)
    for (float b : kEnds) {
      const float wider = kSteps / (kSteps - a - b);
      Vector q1{}, q2{}, qt{};
      for (int i = 0; i < kValues; i++) {
        const Vector q = whole((t[i] - a) * wider, 0, kSteps);
        q1 += q, q2 += q * q, qt += q * t[i];
      }
      const Vector shared = qt - q1 * total / kValues, slope = quotient(shared, q2 - q1 * q1 / kValues);
      const Vector lifted = qt + zero * q1, through = quotient(lifted, q2);
      const auto above = slope * q1 < raised;
      const Vector gain = above ? lifted * through - raised * raised / kValues : shared * slope;
      const auto better = gain > best;
      best = better ? gain : best;
      best_slope = better ? (above ? through : slope) : best_slope;
      best_sum = better ? q1 : best_sum;
    }
  const Vector scale = best_slope * step, middle = best_sum / kValues, minimum = scale * middle - mean;
  return {scale > 0 ? scale : Vector{}, minimum > 0 ? minimum : Vector{}, middle};
}

// The smallest f16 unit such that 63 units are at least as large as each scale of a block.
float unit_of(const Vector& sizes) {
  float most = 0;
  for (int g = 0; g < kGroups; g++) most = std::max(most, sizes[g]);
  const float unit = most / kSizes;
  const uint16_t half = std::bit_cast<uint16_t>(_Float16(unit));
  return from_f16(from_f16(half) < unit ? uint16_t(half + 1) : half);
}

void choose_lines(const float* values, LineBlock* to) {
  LineBlock& block = *to;
  block = {};
  int beyond = 0;
  for (int i = 0; i < intaglio::kBlock; i++) beyond += !(std::fabs(values[i]) <= kLargest);
  if (beyond) {
    block.unit = NAN;
    return;
  }
  Vector x[kValues], mean{};
  for (int i = 0; i < kValues; i++) {
    for (int g = 0; g < kGroups; g++) x[i][g] = values[g * kValues + i];
    mean += x[i];
  }
  mean /= kValues;
  const Lines found = lines_of(x, mean);
  block.unit = unit_of(found.scale), block.low_unit = unit_of(found.minimum);
  const Vector unit = Vector{} + block.unit, low_unit = Vector{} + block.low_unit;
  const Vector nearest = whole(quotient(found.scale, unit), 0, kSizes);
  Vector least = Vector{} + INFINITY, sizes{}, lows{};
  for (float i : {-1.0f, 0.0f, 1.0f}) {
    const Vector size = whole(nearest + i, 0, kSizes), scale = size * unit, inverse = quotient(Vector{} + 1, scale);
    const Vector below = whole(quotient(scale * found.middle - mean, low_unit), 0, kSizes);
    for (float j : {-1.0f, 0.0f, 1.0f}) {
      const Vector low = whole(below + j, 0, kSizes), minimum = low * low_unit;
      Vector error{};
      for (int v = 0; v < kValues; v++) {
        const Vector off = x[v] + minimum - whole((x[v] + minimum) * inverse, 0, kSteps) * scale;
        error += off * off;
      }
      const auto better = error < least;
      least = better ? error : least, sizes = better ? size : sizes, lows = better ? low : lows;
    }
  }
  const Vector inverse = quotient(Vector{} + 1, sizes * unit), minimum = lows * low_unit;
  for (int v = 0; v < kValues; v++) {
    const Vector q = whole((x[v] + minimum) * inverse, 0, kSteps);
    for (int g = 0; g < kGroups; g++) block.codes[g * kValues + v] = uint8_t(q[g]);
  }
  for (int g = 0; g < kGroups; g++) block.sizes[g] = uint8_t(sizes[g]), block.lows[g] = uint8_t(lows[g]);
}

}  // namespace scales
