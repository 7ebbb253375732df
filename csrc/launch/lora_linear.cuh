// What a source file instantiates for one element type, so that the types compile side by side.
#pragma once

#include "../kernels/lora_linear_variants.cuh"
#include "lora_linear.h"
#include "variant.h"

namespace lk {

template <class Element>
cudaError_t launch_lora_linear(const LoraLinearParams& p, const LoraLinearConfig& config, cudaStream_t stream) {
  if (config.blocks == 0) return cudaSuccess;  // not every call has every launch
  return with_variant(LoraForwardVariants<Element>{}, config.key, [&]<class Kernel>(Kernel) {
    return launch_variant<Kernel>(&lora_linear_kernel<Kernel>, config.blocks, p, stream);
  });
}

template <class Element>
cudaError_t launch_lora_grad_x(const LoraLinearParams& p, const LoraLinearConfig& config, cudaStream_t stream) {
  if (config.blocks == 0) return cudaSuccess;
  return with_variant(LoraGradXVariants<Element>{}, config.key, [&]<class Kernel>(Kernel) {
    return launch_variant<Kernel>(&lora_linear_kernel<Kernel>, config.blocks, p, stream);
  });
}

template <class Element>
cudaError_t launch_lora_grads(const LoraGradsParams& p, const LoraGradsConfig& config, cudaStream_t stream) {
  return with_variant(LoraGradsVariants<Element>{}, config.key, [&]<class Kernel>(Kernel) {
    return launch_variant<Kernel>(&lora_grads_kernel<Kernel>, config.blocks, p, stream);
  });
}

template <class Element>
KernelInfo describe_lora_linear(const LoraKey& key) {
  return describe_one<LoraLinearParams>(LoraForwardVariants<Element>{}, key, "lora_linear_kernel");
}

template <class Element>
KernelInfo describe_lora_grad_x(const LoraKey& key) {
  return describe_one<LoraLinearParams>(LoraGradXVariants<Element>{}, key, "lora_linear_kernel");
}

template <class Element>
KernelInfo describe_lora_grads(const LoraGradsKey& key) {
  return describe_one<LoraGradsParams>(LoraGradsVariants<Element>{}, key, "lora_grads_kernel");
}

template <class Element>
std::vector<KernelInfo> lora_linear_kernels() {
  return describe_all<LoraLinearParams>(LoraForwardVariants<Element>{}, "lora_linear_kernel");
}

template <class Element>
std::vector<KernelInfo> lora_backward_kernels() {
  std::vector<KernelInfo> all = describe_all<LoraLinearParams>(LoraGradXVariants<Element>{}, "lora_linear_kernel");
  const auto grads = describe_all<LoraGradsParams>(LoraGradsVariants<Element>{}, "lora_grads_kernel");
  all.insert(all.end(), grads.begin(), grads.end());
  return all;
}

}  // namespace lk
