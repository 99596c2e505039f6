// Unit tests of packing: packed weights read back as the rows or codes that they were packed from.
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

#include "isa/select.h"
#include "pack/weight.h"
#include "test/check.h"

namespace intaglio {
namespace {

std::vector<float> random_values(size_t n, uint32_t seed) {
  std::mt19937 draw(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(n);
  for (float& v : values) v = normal(draw);
  return values;
}

std::vector<float> unpacked(const PackedWeight& w) {
  std::vector<float> out(size_t(w.w.n * w.w.k));
  for (int64_t row = 0; row < w.w.n; row++) unpack_row(w.w, row, out.data() + row * w.w.k);
  return out;
}

TEST(plain_formats_round_trip_exactly) {
  const int64_t n = 70, k = 37;
  const std::vector<float> values = random_values(size_t(n * k), 1);
  for (bool glu : {false, true}) {
    PackedWeight w(format_of("f32"), n, k, 0, glu);
    w.fill(values.data(), Source::F32, 0, 41, 2, *kernels_of("scalar"));  // in two parts, which end within a panel
    w.fill(values.data() + 41 * k, Source::F32, 41, n - 41, 1, *kernels_of("scalar"));
    CHECK(unpacked(w) == values);
  }
}

TEST(quantised_rows_round_trip_within_one_and_a_half_steps) {
  struct Tolerance {
    const char* family;
    int64_t group;
    float step;  // distance of neighbouring values, as a fraction of the group's largest value
  };
  const int64_t n = 34, k = 512;
  const std::vector<float> values = random_values(size_t(n * k), 2);
  for (const auto& [family, group, step] : {Tolerance{"int8", 64, 1 / 127.0f}, {"int8row", 512, 1 / 127.0f}, {"int4", 32, 1 / 8.0f},
                                            {"mxfp4", 32, 1 / 2.0f}, {"fp8", 128, 1 / 8.0f}, {"q4_k", 32, 1 / 7.0f}}) {
    PackedWeight w(format_of(family), n, k, group, false);
    w.fill(values.data(), Source::F32, 0, n, 2, *kernels_of("scalar"));
    const std::vector<float> got = unpacked(w);
    for (int64_t from = 0; from < n * k; from += group) {
      float largest = 0;
      for (int64_t i = from; i < from + group; i++) largest = std::max(largest, std::fabs(values[size_t(i)]));
      for (int64_t i = from; i < from + group; i++)
        if (const float error = std::fabs(got[size_t(i)] - values[size_t(i)]); !(error <= 1.5f * step * largest))
          test::fail(__FILE__, __LINE__, std::string(family) + " is off by " + std::to_string(error / largest) + " of the largest");
    }
  }
}

TEST(codes_of_checkpoints_are_packed_unchanged) {
  const int64_t n = 33, k = 64, group = 32;
  std::vector<uint8_t> codes(size_t(n * k));
  std::vector<float> ones(size_t(n * k / group), 1.0f);
  struct Codes {
    const char* family;
    int low, count, step;
  };
  for (const auto& [family, low, count, step] : {Codes{"int8", -128, 256, 1}, {"int4", -8, 16, 1}, {"uint8", 0, 256, 1}, {"uint4", 0, 16, 1}, {"affine8", 0, 256, 1}, {"affine4", 0, 16, 1}}) {
    for (size_t i = 0; i < codes.size(); i++) codes[i] = uint8_t(low + int(i * size_t(step)) % count);
    PackedWeight w(format_of(family), n, k, group, false);
    std::vector<float> zeros(ones.size(), 0.0f);
    w.fill_codes({codes.data(), ones.data(), w.w.zeros() ? zeros.data() : w.w.affine() ? ones.data() : nullptr, nullptr, nullptr}, 0, n, 2);
    const std::vector<float> got = unpacked(w);
    for (size_t i = 0; i < codes.size(); i++) CHECK_EQUAL(got[i], float(low < 0 ? int8_t(codes[i]) : codes[i]) - (w.w.affine() ? 1.0f : 0.0f));
  }
  const int levels[] = {0, 1, 2, 3, 4, 6, 8, 12};  // twice E2M1's values
  for (size_t i = 0; i < codes.size(); i++) codes[i] = uint8_t(levels[i % 8] * (i % 3 ? 1 : -1));
  PackedWeight w(format_of("mxfp4"), n, k, group, false);
  w.fill_codes({codes.data(), ones.data(), nullptr, nullptr, nullptr}, 0, n, 1);
  const std::vector<float> got = unpacked(w);
  for (size_t i = 0; i < codes.size(); i++) CHECK_EQUAL(got[i], float(int8_t(codes[i])));
}

TEST(factored_scales_are_packed_unchanged) {
  const int64_t n = 35, k = 48, groups = k / 16;
  const int levels[] = {0, 1, 2, 3, 4, 6, 8, 12};
  std::vector<uint8_t> codes(size_t(n * k));
  for (size_t i = 0; i < codes.size(); i++) codes[i] = uint8_t(levels[i * 7 % 8] * (i % 3 ? 1 : -1));
  std::vector<float> factors(static_cast<size_t>(n)), scales(size_t(n * groups));
  const float sizes[] = {448, 0x1p-9f, 3 * 0x1p-9f, 1, 240, 0x1.cp-6f, 0};  // E4M3, two of them subnormal
  for (size_t r = 0; r < factors.size(); r++) factors[r] = 0.001f * float(r + 1);
  for (size_t i = 0; i < scales.size(); i++) scales[i] = sizes[i % 7] * factors[i / size_t(groups)];
  scales[5] = NAN;
  PackedWeight w(format_of("nvfp4"), n, k, 16, false);
  w.fill_codes({codes.data(), scales.data(), nullptr, factors.data(), nullptr}, 0, n, 2);
  const std::vector<float> got = unpacked(w);
  for (size_t i = 0; i < codes.size(); i++) {
    const bool poisoned = i / size_t(k) == 1;  // its row has a NaN
    CHECK(poisoned ? std::isnan(got[i]) : got[i] == float(int8_t(codes[i])) * scales[i / 16]);
  }
}

TEST(stacked_matrices_are_packed_row_by_row) {
  PackedWeight whole(format_of("bf16"), 96, 40, 0, false), second(format_of("bf16"), 32, 40, 0, false);
  const std::vector<float> values = random_values(96 * 40, 3);
  whole.fill(values.data(), Source::F32, 0, 96, 1, *kernels_of("scalar"));
  second.fill(values.data() + 32 * 40, Source::F32, 0, 32, 1, *kernels_of("scalar"));
  CHECK(std::memcmp(whole.w.data + whole.w.panel_bytes, second.w.data, size_t(second.bytes())) == 0);
}

TEST(unsupported_sizes_are_refused) {
  CHECK_THROWS(std::invalid_argument, PackedWeight(format_of("int8"), 4, 64, 48, false), "must be a multiple of 32 from 32 to 1024");
  CHECK_THROWS(std::invalid_argument, PackedWeight(format_of("nvfp4"), 4, 64, 32, false), "nvfp4 has groups of 16");
  CHECK_THROWS(std::invalid_argument, PackedWeight(format_of("q4_k"), 4, 128, 32, false), "multiple of 256 values");
  CHECK_THROWS(std::invalid_argument, PackedWeight(format_of("f32"), 3, 8, 0, true), "an even number of rows");
  PackedWeight w(format_of("f32"), 4, 8, 0, false);
  CHECK_THROWS(std::invalid_argument, w.fill(nullptr, Source::F32, 3, 2, 1, *kernels_of("scalar")), "rows outside the weight");
  CHECK_THROWS(std::invalid_argument, w.place(std::make_shared<Memory>(64), 0), "does not fit its region");
}

TEST(bf16_rounds_to_nearest_ties_to_even) {
  CHECK_EQUAL(to_bf16(1.0f), 0x3f80);
  CHECK_EQUAL(to_bf16(1.00390625f), 0x3f80);  // a tie
  CHECK_EQUAL(to_bf16(1.01171875f), 0x3f82);  // a tie
  CHECK_EQUAL(to_bf16(-INFINITY), 0xff80);
  CHECK((to_bf16(NAN) & 0x7fff) > 0x7f80);
}

}  // namespace
}  // namespace intaglio
