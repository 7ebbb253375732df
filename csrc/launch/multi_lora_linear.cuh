// What a source file instantiates for one element type, so that the types compile side by side.
#pragma once

#include "../kernels/multi_lora_linear_variants.cuh"
#include "multi_lora_linear.h"
#include "variant.h"

namespace lk {

template <class Element>
cudaError_t launch_multi_lora_decode(const MultiLoraDecodeParams& p, const LoraLinearConfig& config,
                                     cudaStream_t stream) {
  return with_variant(MultiDecodeVariants<Element>{}, config.key, [&]<class Kernel>(Kernel) {
    return launch_variant<Kernel>(&multi_lora_decode_kernel<Kernel>, config.blocks, p, stream);
  });
}

template <class Element>
cudaError_t launch_multi_lora_branch(const MultiLoraBranchParams& p, const LoraLinearConfig& config,
                                     cudaStream_t stream) {
  return with_variant(MultiBranchVariants<Element>{}, config.key, [&]<class Kernel>(Kernel) {
    return launch_variant<Kernel>(&multi_lora_branch_kernel<Kernel>, config.blocks, p, stream);
  });
}

template <class Element>
cudaError_t launch_multi_lora_grads(const MultiLoraGradsParams& p, const LoraGradsConfig& config, cudaStream_t stream) {
  return with_variant(MultiGradsVariants<Element>{}, config.key, [&]<class Kernel>(Kernel) {
    return launch_variant<Kernel>(&multi_lora_grads_kernel<Kernel>, config.blocks, p, stream);
  });
}

template <class Element>
KernelInfo describe_multi_lora_decode(const LoraKey& key) {
  return describe_one<MultiLoraDecodeParams>(MultiDecodeVariants<Element>{}, key, "multi_lora_decode_kernel");
}

template <class Element>
KernelInfo describe_multi_lora_branch(const LoraKey& key) {
  return describe_one<MultiLoraBranchParams>(MultiBranchVariants<Element>{}, key, "multi_lora_branch_kernel");
}

template <class Element>
KernelInfo describe_multi_lora_grads(const LoraGradsKey& key) {
  return describe_one<MultiLoraGradsParams>(MultiGradsVariants<Element>{}, key, "multi_lora_grads_kernel");
}

template <class Element>
std::vector<KernelInfo> multi_lora_kernels() {
  auto all = describe_all<MultiLoraDecodeParams>(MultiDecodeVariants<Element>{}, "multi_lora_decode_kernel");
  const auto branch = describe_all<MultiLoraBranchParams>(MultiBranchVariants<Element>{}, "multi_lora_branch_kernel");
  const auto grads = describe_all<MultiLoraGradsParams>(MultiGradsVariants<Element>{}, "multi_lora_grads_kernel");
  all.insert(all.end(), branch.begin(), branch.end());
  all.insert(all.end(), grads.begin(), grads.end());
  return all;
}

}  // namespace lk
