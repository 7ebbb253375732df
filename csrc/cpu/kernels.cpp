#include "kernels.h"

#include <cstdlib>
#include <cstring>

namespace lk::cpu {

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const PackedWeightKernels kAvx512Bf16Packed;

// AVX-512 with products of bf16, which packed weights alone have a use for.
static const Kernels& avx512_bf16() {
  static const Kernels kernels = [] {
    Kernels wider = kAvx512;
    wider.isa = "avx512_bf16";
    wider.packed = &kAvx512Bf16Packed;
    return wider;
  }();
  return kernels;
}
#endif

// LORA_KERNELS_CPU_ISA names the widest table to take, so that the tests can run the narrower ones.
static const Kernels& choose() {
#if defined(__x86_64__)
  const char* widest = std::getenv("LORA_KERNELS_CPU_ISA");
  bool reached = widest == nullptr;
  const auto allowed = [&](const char* isa) { return reached = reached || std::strcmp(widest, isa) == 0; };
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16");
  if (allowed("avx512_bf16") && has_bf16) return avx512_bf16();
  if (allowed("avx512") && has_avx512) return kAvx512;
  if (allowed("avx2") && has_avx2) return kAvx2;
#endif
  return kPortable;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace lk::cpu
