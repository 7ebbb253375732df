// What a source file instantiates for one element type, so that the types compile side by side.
#pragma once

#include "../kernels/lora_pack_variants.cuh"
#include "lora_pack.h"
#include "variant.h"

namespace lk {

template <class Element>
cudaError_t launch_lora_pack(const LoraPackParams& p, const LoraPackConfig& config, cudaStream_t stream) {
  return with_variant(PackVariants<Element>{}, config.key, [&]<class Kernel>(Kernel) {
    return launch_variant<Kernel>(&lora_pack_kernel<Kernel>, config.launch.blocks, p, stream);
  });
}

template <class Element>
KernelInfo describe_lora_pack(const LoraPackKey& key) {
  return describe_one<LoraPackParams>(PackVariants<Element>{}, key, "lora_pack_kernel");
}

template <class Element>
std::vector<KernelInfo> lora_pack_kernels() {
  return describe_all<LoraPackParams>(PackVariants<Element>{}, "lora_pack_kernel");
}

}  // namespace lk
