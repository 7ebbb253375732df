// grouped_lora_linear's launches, and its gradients'.
#pragma once

#include <vector>

#include "../config/grouped_lora_linear.h"
#include "../params/grouped_lora_linear.h"
#include "lora_linear.h"

namespace lk {

// Of y and s, or of dX and s', as the key says.
template <class Element>
cudaError_t launch_grouped_lora(const GroupedLoraLinearParams& params, const GroupedLoraConfig& config,
                                cudaStream_t stream);
template <class Element>
cudaError_t launch_grouped_lora_grads(const GroupedLoraGradsParams& params, const LoraGradsConfig& config,
                                      cudaStream_t stream);
template <class Element>
KernelInfo describe_grouped_lora(const GroupedLoraKey& key);
template <class Element>
KernelInfo describe_grouped_lora_grads(const LoraGradsKey& key);
template <class Element>
std::vector<KernelInfo> grouped_lora_kernels();

}  // namespace lk
