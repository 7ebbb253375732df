#include "../kernels/prompt_embedding.cuh"
#include "../kernels/prompt_embedding_backward.cuh"
#include "prompt_embedding.h"
#include "variant.h"

namespace lk {

cudaError_t launch_prompt_embedding(const PromptEmbeddingParams& p, const PromptEmbeddingConfig& config,
                                    cudaStream_t stream) {
  return with_variant(RowVariants<PromptEmbedding>{}, RowsKey{p.type, config.aligned}, [&]<class Kernel>(Kernel) {
    return launch_variant<Kernel>(&prompt_embedding_kernel<Kernel>, config.blocks, p, stream);
  });
}

KernelInfo describe_prompt_embedding(FloatType type, bool aligned) {
  return describe_one<PromptEmbeddingParams>(RowVariants<PromptEmbedding>{}, RowsKey{type, aligned},
                                             "prompt_embedding_kernel");
}

cudaError_t launch_prompt_embedding_backward(const PromptEmbeddingBackwardParams& p, const PromptBackwardConfig& config,
                                             cudaStream_t stream) {
  return with_variant(
      RowVariants<PromptEmbeddingBackward>{}, RowsKey{p.type, config.aligned}, [&]<class Kernel>(Kernel) {
        return launch_variant<Kernel>(&prompt_embedding_backward_kernel<Kernel>, config.blocks(), p, stream);
      });
}

KernelInfo describe_prompt_embedding_backward(FloatType type, bool aligned) {
  return describe_one<PromptEmbeddingBackwardParams>(RowVariants<PromptEmbeddingBackward>{}, RowsKey{type, aligned},
                                                     "prompt_embedding_backward_kernel");
}

std::vector<KernelInfo> prompt_embedding_kernels() {
  std::vector<KernelInfo> all =
      describe_all<PromptEmbeddingParams>(RowVariants<PromptEmbedding>{}, "prompt_embedding_kernel");
  const auto backward = describe_all<PromptEmbeddingBackwardParams>(RowVariants<PromptEmbeddingBackward>{},
                                                                    "prompt_embedding_backward_kernel");
  all.insert(all.end(), backward.begin(), backward.end());
  return all;
}

}  // namespace lk
