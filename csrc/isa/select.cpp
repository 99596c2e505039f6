// The instruction sets that this build and this CPU support, fastest first, and the table of kernels of each by its name.
#include "isa/select.h"

#include <stdexcept>

namespace intaglio {

namespace {
#if defined(INTAGLIO_HAVE_AVX2)
bool cpu_has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
#endif
#if defined(INTAGLIO_HAVE_AVX512)
bool cpu_has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vbmi");
}
#endif
}  // namespace

std::vector<std::string> isas() {
  std::vector<std::string> names;
#if defined(INTAGLIO_HAVE_AVX512)
  if (cpu_has_avx512()) names.push_back("avx512");
#endif
#if defined(INTAGLIO_HAVE_AVX2)
  if (cpu_has_avx2()) names.push_back("avx2");
#endif
  names.push_back("scalar");
  return names;
}

const Kernels* kernels_of(const std::string& isa) {
  for (const std::string& name : isas())
    if (name == isa) {
#if defined(INTAGLIO_HAVE_AVX512)
      if (isa == "avx512") return kernels_avx512();
#endif
#if defined(INTAGLIO_HAVE_AVX2)
      if (isa == "avx2") return kernels_avx2();
#endif
      return kernels_scalar();
    }
  std::string usable;
  for (const std::string& name : isas()) usable += (usable.empty() ? "" : ", ") + name;
  throw std::invalid_argument("instruction set '" + isa + "' is not usable here; this CPU and build have " + usable);
}

}  // namespace intaglio
