// The launch of a kernel variant, and what is known of it without one. A source file instantiates what follows for one
// element type, so that the types compile side by side.
#pragma once

#include "../kernels/lora_linear_variants.cuh"
#include "describe.h"
#include "launch.h"

namespace lk {

template <class Variant, class Params>
cudaError_t launch_variant(void (*kernel)(Params), int64_t blocks, const Params& p, cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;  // tickets are 32 bits wide
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Variant::kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), Variant::kThreads, Variant::kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

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
