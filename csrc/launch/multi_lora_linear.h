// multi_lora_linear's launches, and its gradients'.
#pragma once

#include <vector>

#include "../config/multi_lora_linear.h"
#include "../params/multi_lora_linear.h"
#include "lora_linear.h"

namespace lk {

// All of few rows.
template <class Element>
cudaError_t launch_multi_lora_decode(const MultiLoraDecodeParams& params, const LoraLinearConfig& config,
                                     cudaStream_t stream);

// Of many rows: their order, which the others are given, ...
cudaError_t launch_multi_lora_order(const MultiLoraOrderParams& params, cudaStream_t stream);
// ... s, or the branch, or the same of the gradient of x, as the key says, ...
template <class Element>
cudaError_t launch_multi_lora_branch(const MultiLoraBranchParams& params, const LoraLinearConfig& config,
                                     cudaStream_t stream);
// ... and the gradients of the adapters.
template <class Element>
cudaError_t launch_multi_lora_grads(const MultiLoraGradsParams& params, const LoraGradsConfig& config,
                                    cudaStream_t stream);

template <class Element>
KernelInfo describe_multi_lora_decode(const LoraKey& key);
KernelInfo describe_multi_lora_order();
template <class Element>
KernelInfo describe_multi_lora_branch(const LoraKey& key);
template <class Element>
KernelInfo describe_multi_lora_grads(const LoraGradsKey& key);
// But for the order's.
template <class Element>
std::vector<KernelInfo> multi_lora_kernels();

}  // namespace lk
