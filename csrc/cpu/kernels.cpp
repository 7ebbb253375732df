#include "kernels.h"

#include <cstdlib>
#include <cstring>

namespace lk::cpu {

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
#endif

// LORA_KERNELS_CPU_ISA=portable keeps to the portable table, so that the tests can run it on any machine.
static const Kernels& choose() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("LORA_KERNELS_CPU_ISA");
  const bool portable = wanted != nullptr && std::strcmp(wanted, "portable") == 0;
  __builtin_cpu_init();
  if (!portable && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kPortable;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace lk::cpu
