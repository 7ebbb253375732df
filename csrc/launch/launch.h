// Host entry points of the CUDA kernels: Params and a stream in, cudaError_t out. No torch.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "../config.h"
#include "../params.h"
#include "../prefix_config.h"
#include "../prompt_config.h"

namespace lk {

// A kernel as far as a plan needs it.
struct KernelInfo {
  std::string name;  // mangled
  int threads;
  int shared_bytes;  // dynamic
};

cudaError_t launch_dropout_mask(const DropoutMaskParams& params, cudaStream_t stream);
KernelInfo describe_dropout_mask();

cudaError_t launch_prompt_embedding(const PromptEmbeddingParams& params, const PromptEmbeddingConfig& config,
                                    cudaStream_t stream);
cudaError_t launch_prompt_embedding_backward(const PromptEmbeddingBackwardParams& params,
                                             const PromptBackwardConfig& config, cudaStream_t stream);
KernelInfo describe_prompt_embedding(FloatType type, bool aligned);
KernelInfo describe_prompt_embedding_backward(FloatType type, bool aligned);

cudaError_t launch_prefix_kv(const PrefixKvParams& params, const PrefixConfig& config, cudaStream_t stream);
cudaError_t launch_prefix_kv_backward(const PrefixKvBackwardParams& params, const PrefixConfig& config,
                                      cudaStream_t stream);
KernelInfo describe_prefix_kv(FloatType type, bool aligned);
KernelInfo describe_prefix_kv_backward(FloatType type, bool aligned);

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
