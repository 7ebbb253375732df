#include "variant.h"

namespace lk {

// Each element type has a source file of its own, so that they compile side by side.
template <>
cudaError_t launch_lora_linear<BFloat16>(const LoraLinearParams& p, const LoraLinearConfig& config,
                                         cudaStream_t stream) {
  return with_lora_linear_variant<BFloat16>(config, [&](auto variant) {
    using Variant = decltype(variant);
    return launch_variant<Variant>(&lora_linear_kernel<Variant>, config.blocks, p, stream);
  });
}

template <>
cudaError_t launch_frozen_linear<BFloat16>(const LoraLinearParams& p, const LoraLinearConfig& config,
                                           cudaStream_t stream) {
  return with_frozen_linear_variant<BFloat16>(config, [&](auto variant) {
    using Variant = decltype(variant);
    return launch_variant<Variant>(&lora_linear_kernel<Variant>, config.blocks, p, stream);
  });
}

}  // namespace lk
