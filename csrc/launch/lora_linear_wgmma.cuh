// What a source file instantiates for one element type.
#pragma once

#include "../kernels/lora_linear_wgmma_variants.cuh"
#include "lora_linear_wgmma.h"
#include "tensor_maps.h"
#include "variant.h"

namespace lk {

template <class Element>
cudaError_t launch_lora_linear_wgmma(const LoraLinearParams& p, const LoraLinearConfig& config, cudaStream_t stream) {
  constexpr auto kType =
      std::is_same_v<Element, BFloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  if (config.blocks == 0) return cudaSuccess;
  LoraWgmmaParams params = wgmma_params(p, config.key);
  const bool are_encoded =
      with_maps(params, config.key, [](TensorMap& map, const Boxes& boxes) { return encode(map, boxes, kType); });
  if (!are_encoded) return cudaErrorInvalidValue;
  return with_variant(AllLoraWgmmaVariants<Element>{}, config.key, [&]<class Kernel>(Kernel) {
    return launch_variant<Kernel>(&lora_linear_wgmma_kernel<Kernel>, config.blocks, params, stream);
  });
}

template <class Element>
KernelInfo describe_lora_linear_wgmma(const LoraKey& key) {
  return describe_one<LoraWgmmaParams>(AllLoraWgmmaVariants<Element>{}, key, "lora_linear_wgmma_kernel");
}

template <class Element>
std::vector<KernelInfo> lora_linear_wgmma_kernels() {
  return describe_all<LoraWgmmaParams>(AllLoraWgmmaVariants<Element>{}, "lora_linear_wgmma_kernel");
}

}  // namespace lk
