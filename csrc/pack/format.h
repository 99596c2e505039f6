// Parses the names of number formats (as in intaglio.formats) into the enums that the kernels use.
#pragma once
#include <string>

#include "isa/kernels.h"

namespace intaglio {

// Storage format of a weight: format of the codes, format of their scales, and whether a row has a single scale.
struct Format {
  Fmt fmt;
  Scale scale;
  bool row;
  bool operator==(const Format&) const = default;
};

// Type of the values in a checkpoint.
enum class Source : int { F32, F16, BF16 };

// Parses a family name: the format of the codes, then "row" if a row has one scale, then the format of the scales if it is
// not the usual one ("int8", "int8row", "uint4f16", "int4f32"). Throws invalid_argument for an unknown name.
Format format_of(const std::string& family);
Source source_of(const std::string& type);

}  // namespace intaglio
