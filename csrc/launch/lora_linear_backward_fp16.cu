#include "variant.h"

namespace lk {

template <>
cudaError_t launch_lora_grad_x<Float16>(const LoraLinearParams& p, const LoraLinearConfig& config,
                                        cudaStream_t stream) {
  return with_lora_grad_x_variant<Float16>(config, [&](auto variant) {
    using Variant = decltype(variant);
    return launch_variant<Variant>(&lora_linear_kernel<Variant>, config.blocks, p, stream);
  });
}

template <>
cudaError_t launch_lora_grads<Float16>(const LoraGradsParams& p, const LoraGradsConfig& config, cudaStream_t stream) {
  return with_lora_grads_variant<Float16>(config, [&](auto variant) {
    using Variant = decltype(variant);
    return launch_variant<Variant>(&lora_grads_kernel<Variant>, config.blocks, p, stream);
  });
}

}  // namespace lk
