// Host entry points of the CUDA kernels: Params and a stream in, cudaError_t out. No torch.
#pragma once

#include <cuda_runtime_api.h>

#include "../config.h"
#include "../params.h"

namespace lk {

struct BFloat16;
struct Float16;

cudaError_t launch_dropout_mask(const DropoutMaskParams& params, cudaStream_t stream);

// `Element` is BFloat16 or Float16.
template <class Element>
cudaError_t launch_lora_linear(const LoraLinearParams& params, const LoraLinearConfig& config, cudaStream_t stream);
template <class Element>
cudaError_t launch_frozen_linear(const LoraLinearParams& params, const LoraLinearConfig& config, cudaStream_t stream);

// The two launches of the backward, in this order.
template <class Element>
cudaError_t launch_lora_grad_x(const LoraLinearParams& params, const LoraLinearConfig& config, cudaStream_t stream);
template <class Element>
cudaError_t launch_lora_grads(const LoraGradsParams& params, const LoraGradsConfig& config, cudaStream_t stream);

}  // namespace lk
