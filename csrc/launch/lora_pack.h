// lora_pack's launches.
#pragma once

#include <vector>

#include "../config/lora_pack.h"
#include "lora_linear.h"

namespace lk {

// Of every y and s, or of dX and every s', as the key says.
template <class Element>
cudaError_t launch_lora_pack(const LoraPackParams& params, const LoraPackConfig& config, cudaStream_t stream);
template <class Element>
KernelInfo describe_lora_pack(const LoraPackKey& key);
template <class Element>
std::vector<KernelInfo> lora_pack_kernels();

}  // namespace lk
