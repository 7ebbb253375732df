// lora_linear's launches, and its gradients'.
#pragma once

#include <type_traits>
#include <vector>

#include "../config/lora_linear.h"
#include "../params/common.h"
#include "../params/lora_linear.h"
#include "kernel_info.h"

namespace lk {

// Element types of the kernels.
struct BFloat16;
struct Float16;
struct TensorFloat32;

// f(std::type_identity<Element>{}) for tensors of this type, which is not float64. float32 is multiplied in tf32.
template <class F>
auto with_element(FloatType type, const F& f) {
  if (type == FloatType::kFloat32) return f(std::type_identity<TensorFloat32>{});
  return type == FloatType::kBFloat16 ? f(std::type_identity<BFloat16>{}) : f(std::type_identity<Float16>{});
}

template <class Element>
cudaError_t launch_lora_linear(const LoraLinearParams& params, const LoraLinearConfig& config, cudaStream_t stream);
template <class Element>
KernelInfo describe_lora_linear(const LoraKey& key);
template <class Element>
std::vector<KernelInfo> lora_linear_kernels();

// The launches of the backward: of dX, or of its branch alone, then of dA and dB.
template <class Element>
cudaError_t launch_lora_grad_x(const LoraLinearParams& params, const LoraLinearConfig& config, cudaStream_t stream);
template <class Element>
cudaError_t launch_lora_grads(const LoraGradsParams& params, const LoraGradsConfig& config, cudaStream_t stream);
template <class Element>
KernelInfo describe_lora_grad_x(const LoraKey& key);
template <class Element>
KernelInfo describe_lora_grads(const LoraGradsKey& key);
template <class Element>
std::vector<KernelInfo> lora_backward_kernels();

}  // namespace lk
