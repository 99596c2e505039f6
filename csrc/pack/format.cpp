// The table of format names, and the parser of names such as int8row or int4f32.
#include "pack/format.h"

#include <map>
#include <stdexcept>

namespace intaglio {

namespace {

const std::map<std::string, Fmt>& codes() {
  static const std::map<std::string, Fmt> names = {
      {"f32", Fmt::F32}, {"f16", Fmt::F16}, {"bf16", Fmt::BF16}, {"int8", Fmt::I8}, {"uint8", Fmt::U8},
      {"affine8", Fmt::A8}, {"int4", Fmt::I4}, {"uint4", Fmt::U4}, {"affine4", Fmt::A4},
      {"nf4", Fmt::NF4}, {"fp4", Fmt::FP4}, {"mxfp4", Fmt::MX4}, {"nvfp4", Fmt::NV4}, {"q4_k", Fmt::K4}, {"q5_k", Fmt::K5}, {"q6_k", Fmt::K6},
      {"fp8", Fmt::FP8}, {"e4m3", Fmt::FP8}};
  return names;
}

bool drop_end(std::string& name, const std::string& end) {
  const bool has = name.size() > end.size() && name.ends_with(end);
  if (has) name.resize(name.size() - end.size());
  return has;
}

Scale usual_scale(Fmt fmt) {
  return fmt >= Fmt::NF4 ? Scale::F32 : fmt == Fmt::NV4 ? Scale::E4M3 : groups_of_block(fmt) > 1 ? Scale::F16 : Scale::BF16;
}

}  // namespace

Format format_of(const std::string& family) {
  std::string name = family;
  bool half = false, single = false, row = false;
  if (!codes().contains(name)) {
    half = drop_end(name, "f16"), single = !half && drop_end(name, "f32");
    row = drop_end(name, "row");
  }
  auto at = codes().find(name);
  if (at == codes().end()) throw std::invalid_argument("unknown format '" + family + "'");
  const Fmt fmt = at->second;
  const Scale scale = fmt == Fmt::FP8 ? Scale::F32 : half ? Scale::F16 : single ? Scale::F32 : usual_scale(fmt);
  return {fmt, scale, row};
}

Source source_of(const std::string& type) {
  if (type == "f32") return Source::F32;
  if (type == "f16") return Source::F16;
  if (type == "bf16") return Source::BF16;
  throw std::invalid_argument("unknown source type '" + type + "'; weights are read from f32, f16 and bf16");
}

}  // namespace intaglio
