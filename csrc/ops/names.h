// Attributes that several ops have in common: activations, and the format to which x is rounded.
#pragma once
#include "run/op.h"

namespace intaglio {

inline const Choices<Act>& activations() {
  static const Choices<Act> names = {{"", Act::None}, {"silu", Act::Silu}, {"gelu", Act::Gelu}, {"gelu_tanh", Act::GeluTanh},
                                     {"relu", Act::Relu}, {"relu2", Act::Relu2}, {"sigmoid", Act::Sigmoid}, {"tanh", Act::Tanh},
                                     {"exp", Act::Exp}, {"softplus", Act::Softplus}};
  return names;
}

// True if x_format asks to round x to bf16 before a product. Rounding to int8 follows from the weight's format. Throws
// invalid_argument for other formats.
inline bool x_is_bf16(OpArgs& a) {
  const std::string& format = a.word("x_format");
  if (format != "f32" && format != "bf16" && format != "int8")
    throw std::invalid_argument("x_format=" + format + "; the host rounds activations to f32, bf16 or int8");
  return format == "bf16";
}

}  // namespace intaglio
