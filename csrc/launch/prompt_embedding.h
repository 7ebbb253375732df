// prompt_embedding's launch, and its gradients'.
#pragma once

#include <vector>

#include "../config/prompt_embedding.h"
#include "kernel_info.h"

namespace lk {

cudaError_t launch_prompt_embedding(const PromptEmbeddingParams& params, const PromptEmbeddingConfig& config,
                                    cudaStream_t stream);
cudaError_t launch_prompt_embedding_backward(const PromptEmbeddingBackwardParams& params,
                                             const PromptBackwardConfig& config, cudaStream_t stream);
KernelInfo describe_prompt_embedding(FloatType type, bool aligned);
KernelInfo describe_prompt_embedding_backward(FloatType type, bool aligned);
std::vector<KernelInfo> prompt_embedding_kernels();

}  // namespace lk
