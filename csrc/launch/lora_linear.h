// lora_linear's launches, and its gradients'.
#pragma once

#include "../config/lora_linear.h"
#include "../params/lora_linear.h"
#include "kernel_info.h"

namespace lk {

// Element types of what follows.
struct BFloat16;
struct Float16;
struct TensorFloat32;

template <class Element>
cudaError_t launch_lora_linear(const LoraLinearParams& params, const LoraLinearConfig& config, cudaStream_t stream);
template <class Element>
KernelInfo describe_lora_linear(const LoraLinearConfig& config);

// The two launches of the backward, in this order.
template <class Element>
cudaError_t launch_lora_grad_x(const LoraLinearParams& params, const LoraLinearConfig& config, cudaStream_t stream);
template <class Element>
cudaError_t launch_lora_grads(const LoraGradsParams& params, const LoraGradsConfig& config, cudaStream_t stream);
template <class Element>
KernelInfo describe_lora_grad_x(const LoraLinearConfig& config);
template <class Element>
KernelInfo describe_lora_grads(const LoraGradsConfig& config);

}  // namespace lk
