#include "../kernels/lora_linear_packed.cuh"
#include "lora_linear_packed.h"
#include "variant.h"

namespace lk {

cudaError_t launch_lora_linear_packed(const LoraLinearPackedParams& p, FloatType type,
                                      const LoraLinearPackedConfig& config, cudaStream_t stream) {
  return with_variant(LoraLinearPackedVariants{}, PackedKey{type, config.row_tile}, [&]<class Kernel>(Kernel) {
    return launch_variant<Kernel>(&lora_linear_packed_kernel<Kernel>, config.blocks, p, stream);
  });
}

KernelInfo describe_lora_linear_packed(FloatType type, const LoraLinearPackedConfig& config) {
  return describe_one<LoraLinearPackedParams>(LoraLinearPackedVariants{}, PackedKey{type, config.row_tile},
                                              "lora_linear_packed_kernel");
}

std::vector<KernelInfo> lora_linear_packed_kernels() {
  return describe_all<LoraLinearPackedParams>(LoraLinearPackedVariants{}, "lora_linear_packed_kernel");
}

}  // namespace lk
