// The instruction sets that this build and this CPU support, fastest first, and the table of kernels of each by its name.
#include "isa/select.h"

#include <stdexcept>

#if defined(INTAGLIO_HAVE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
#if defined(INTAGLIO_HAVE_AMX)
// Also asks Linux to let this process use the matrix registers, whose 8 KiB a thread keeps when it is descheduled. Child
// processes inherit the permission until they call exec. Refused by systems that do not know AMX.
bool cpu_has_amx() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTile | kInt8;
  unsigned a, b, c, d;
  if (!cpu_has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif
}  // namespace

std::vector<std::string> isas() {
  std::vector<std::string> names;
#if defined(INTAGLIO_HAVE_AMX)
  static const bool amx = cpu_has_amx();
  if (amx) names.push_back("amx");
#endif
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
#if defined(INTAGLIO_HAVE_AMX)
      if (isa == "amx") return kernels_amx();
#endif
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
