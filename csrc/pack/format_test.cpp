// Unit tests of the parser of format names.
#include "pack/format.h"

#include "test/check.h"

namespace intaglio {
namespace {

TEST(family_names_are_parsed_into_codes_scales_and_row) {
  CHECK(format_of("f32") == (Format{Fmt::F32, Scale::BF16, false}));
  CHECK(format_of("bf16") == (Format{Fmt::BF16, Scale::BF16, false}));
  CHECK(format_of("int8") == (Format{Fmt::I8, Scale::BF16, false}));
  CHECK(format_of("int8row") == (Format{Fmt::I8, Scale::BF16, true}));
  CHECK(format_of("int4f16") == (Format{Fmt::I4, Scale::F16, false}));
  CHECK(format_of("uint4f32") == (Format{Fmt::U4, Scale::F32, false}));
  CHECK(format_of("int8rowf32") == (Format{Fmt::I8, Scale::F32, true}));
  CHECK(format_of("fp8") == (Format{Fmt::FP8, Scale::F32, false}));
  CHECK(format_of("fp8row") == (Format{Fmt::FP8, Scale::F32, true}));
  CHECK(format_of("mxfp4") == (Format{Fmt::MX4, Scale::BF16, false}));
  CHECK(format_of("affine4f16") == (Format{Fmt::A4, Scale::F16, false}));
  CHECK(format_of("affine8row") == (Format{Fmt::A8, Scale::BF16, true}));
  CHECK(format_of("nf4") == (Format{Fmt::NF4, Scale::F32, false}));
  CHECK(format_of("fp4") == (Format{Fmt::FP4, Scale::F32, false}));
  CHECK(format_of("nvfp4") == (Format{Fmt::NV4, Scale::E4M3, false}));
  CHECK(format_of("q4_k") == (Format{Fmt::K4, Scale::F16, false}));
  CHECK(format_of("q5_k") == (Format{Fmt::K5, Scale::F16, false}));
  CHECK(format_of("q6_k") == (Format{Fmt::K6, Scale::F16, false}));
}

TEST(unknown_format_names_are_refused) {
  for (const char* name : {"", "int", "f64", "row", "int8roww", "f16f16f16"})
    CHECK_THROWS(std::invalid_argument, format_of(name), "unknown format '" + std::string(name) + "'");
  CHECK_THROWS(std::invalid_argument, source_of("int8"), "unknown source type 'int8'");
  CHECK(source_of("f16") == Source::F16);
}

}  // namespace
}  // namespace intaglio
