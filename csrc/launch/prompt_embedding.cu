#include "../kernels/prompt_embedding.cuh"
#include "../kernels/prompt_embedding_backward.cuh"
#include "prompt_embedding.h"
#include "variant.h"

namespace lk {

cudaError_t launch_prompt_embedding(const PromptEmbeddingParams& p, const PromptEmbeddingConfig& config,
                                    cudaStream_t stream) {
  return with_prompt_variant<PromptEmbedding>(p.type, config.aligned, [&](auto variant) {
    using Variant = decltype(variant);
    return launch_variant<Variant>(&prompt_embedding_kernel<Variant>, config.blocks, p, stream);
  });
}

KernelInfo describe_prompt_embedding(FloatType type, bool aligned) {
  return with_prompt_variant<PromptEmbedding>(type, aligned, [](auto variant) {
    return describe_variant<decltype(variant), PromptEmbeddingParams>("prompt_embedding_kernel");
  });
}

cudaError_t launch_prompt_embedding_backward(const PromptEmbeddingBackwardParams& p, const PromptBackwardConfig& config,
                                             cudaStream_t stream) {
  return with_prompt_variant<PromptEmbeddingBackward>(p.type, config.aligned, [&](auto variant) {
    using Variant = decltype(variant);
    return launch_variant<Variant>(&prompt_embedding_backward_kernel<Variant>, config.blocks(), p, stream);
  });
}

KernelInfo describe_prompt_embedding_backward(FloatType type, bool aligned) {
  return with_prompt_variant<PromptEmbeddingBackward>(type, aligned, [](auto variant) {
    return describe_variant<decltype(variant), PromptEmbeddingBackwardParams>("prompt_embedding_backward_kernel");
  });
}

}  // namespace lk
