// What a source file instantiates for one element type, so that the types compile side by side.
#pragma once

#include "../kernels/grouped_lora_linear_variants.cuh"
#include "grouped_lora_linear.h"
#include "variant.h"

namespace lk {

template <class Element>
using GroupedVariants = Concat<GroupedForwardVariants<Element>, GroupedGradXVariants<Element>>;

template <class Element>
cudaError_t launch_grouped_lora(const GroupedLoraLinearParams& p, const GroupedLoraConfig& config,
                                cudaStream_t stream) {
  return with_variant(GroupedVariants<Element>{}, config.key, [&]<class Kernel>(Kernel) {
    return launch_variant<Kernel>(&grouped_lora_linear_kernel<Kernel>, config.launch.blocks, p, stream);
  });
}

template <class Element>
cudaError_t launch_grouped_lora_grads(const GroupedLoraGradsParams& p, const LoraGradsConfig& config,
                                      cudaStream_t stream) {
  return with_variant(GroupedGradsVariants<Element>{}, config.key, [&]<class Kernel>(Kernel) {
    return launch_variant<Kernel>(&grouped_lora_grads_kernel<Kernel>, config.blocks, p, stream);
  });
}

template <class Element>
KernelInfo describe_grouped_lora(const GroupedLoraKey& key) {
  return describe_one<GroupedLoraLinearParams>(GroupedVariants<Element>{}, key, "grouped_lora_linear_kernel");
}

template <class Element>
KernelInfo describe_grouped_lora_grads(const LoraGradsKey& key) {
  return describe_one<GroupedLoraGradsParams>(GroupedGradsVariants<Element>{}, key, "grouped_lora_grads_kernel");
}

template <class Element>
std::vector<KernelInfo> grouped_lora_kernels() {
  std::vector<KernelInfo> all =
      describe_all<GroupedLoraLinearParams>(GroupedVariants<Element>{}, "grouped_lora_linear_kernel");
  const auto grads = describe_all<GroupedLoraGradsParams>(GroupedGradsVariants<Element>{}, "grouped_lora_grads_kernel");
  all.insert(all.end(), grads.begin(), grads.end());
  return all;
}

}  // namespace lk
