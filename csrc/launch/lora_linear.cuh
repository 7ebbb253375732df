// What a source file instantiates for one element type, so that the types compile side by side.
#pragma once

#include "../kernels/lora_linear_variants.cuh"
#include "lora_linear.h"
#include "variant.h"

namespace lk {

template <class Element>
cudaError_t launch_lora_linear(const LoraLinearParams& p, const LoraLinearConfig& config, cudaStream_t stream) {
  return with_lora_linear_variant<Element>(config, [&](auto variant) {
    using Variant = decltype(variant);
    return launch_variant<Variant>(&lora_linear_kernel<Variant>, config.blocks, p, stream);
  });
}

template <class Element>
KernelInfo describe_lora_linear(const LoraLinearConfig& config) {
  return with_lora_linear_variant<Element>(
      config, [](auto variant) { return describe_variant<decltype(variant), LoraLinearParams>("lora_linear_kernel"); });
}

template <class Element>
cudaError_t launch_lora_grad_x(const LoraLinearParams& p, const LoraLinearConfig& config, cudaStream_t stream) {
  return with_lora_grad_x_variant<Element>(config, [&](auto variant) {
    using Variant = decltype(variant);
    return launch_variant<Variant>(&lora_linear_kernel<Variant>, config.blocks, p, stream);
  });
}

template <class Element>
KernelInfo describe_lora_grad_x(const LoraLinearConfig& config) {
  return with_lora_grad_x_variant<Element>(
      config, [](auto variant) { return describe_variant<decltype(variant), LoraLinearParams>("lora_linear_kernel"); });
}

template <class Element>
cudaError_t launch_lora_grads(const LoraGradsParams& p, const LoraGradsConfig& config, cudaStream_t stream) {
  return with_lora_grads_variant<Element>(config, [&](auto variant) {
    using Variant = decltype(variant);
    return launch_variant<Variant>(&lora_grads_kernel<Variant>, config.blocks, p, stream);
  });
}

template <class Element>
KernelInfo describe_lora_grads(const LoraGradsConfig& config) {
  return with_lora_grads_variant<Element>(
      config, [](auto variant) { return describe_variant<decltype(variant), LoraGradsParams>("lora_grads_kernel"); });
}

}  // namespace lk
