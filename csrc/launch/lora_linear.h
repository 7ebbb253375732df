// The launch of lora_linear for one element type; each type has a source file, so that they compile side by side.
#pragma once

#include "../kernels/lora_linear_variants.cuh"
#include "describe.h"
#include "launch.h"

namespace lk {

template <class Element>
cudaError_t launch_lora_linear(const LoraLinearParams& p, const LoraLinearConfig& config, cudaStream_t stream) {
  if (config.blocks == 0) return cudaSuccess;
  if (config.blocks > INT32_MAX) return cudaErrorInvalidValue;  // tickets are 32 bits wide
  return with_lora_linear_variant<Element>(config, [&](auto variant) {
    using Variant = decltype(variant);
    const auto kernel = lora_linear_kernel<Variant>;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Variant::kSharedBytes);
    if (error != cudaSuccess) return error;
    kernel<<<static_cast<unsigned>(config.blocks), Variant::kThreads, Variant::kSharedBytes, stream>>>(p);
    return cudaGetLastError();
  });
}

template <class Element>
KernelInfo describe_lora_linear(const LoraLinearConfig& config) {
  return with_lora_linear_variant<Element>(
      config, [](auto variant) { return describe_variant<decltype(variant), LoraLinearParams>("lora_linear_kernel"); });
}

}  // namespace lk
