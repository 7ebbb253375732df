// The CUDA binding of prompt_embedding as it is, over CPU tensors and emulated launches: ops of
// `lora_kernels_emulated_prompt`. Test only.
#include "../kernels/prompt_embedding.cuh"
#include "../kernels/prompt_embedding_backward.cuh"
#include "../launch/prompt_embedding.h"
#include "launch_over_torch.h"

namespace lk {
namespace {

void add_indices(Memory& memory, const IndexArray& a, int64_t count) {
  memory.input(a.data, a.is_int64 ? 8 : 4, 1, count, 0);
}

void add_column(Memory& memory, const TokenColumn& c, int64_t tokens, int64_t rows) {
  memory.input(c.tokens, c.element_size, 1, tokens, 0);
  memory.output(c.out, rows * c.element_size);
}

}  // namespace

cudaError_t launch_prompt_embedding(const PromptEmbeddingParams& p, const PromptEmbeddingConfig& config,
                                    cudaStream_t stream) {
  const PromptSizes& s = p.sizes;
  const int64_t tokens = s.batch * s.tokens, rows = s.batch * (s.prompt_rows + s.tokens);
  const size_t element = size_of(p.type);
  Memory memory;
  if (p.ids.data != nullptr) {
    memory.input(p.source, element, s.vocabulary, s.hidden, p.source_stride);
  } else {
    for (int64_t b = 0; b < s.batch; ++b) {
      memory.input(static_cast<const char*>(p.source) + b * p.source_batch_stride * element, element, s.tokens,
                   s.hidden, p.source_stride);
    }
  }
  for (int64_t task = 0; task < s.tasks; ++task) {
    const size_t prompt_element = size_of(p.prompt_type);
    memory.input(static_cast<const char*>(p.prompt) + task * p.prompt_task_stride * prompt_element, prompt_element,
                 s.prompt_rows, s.hidden, p.prompt_stride);
  }
  add_indices(memory, p.ids, tokens);
  add_indices(memory, p.task_ids, s.batch);
  add_indices(memory, p.prompt_lengths, s.batch);
  add_column(memory, p.mask, tokens, rows);
  add_column(memory, p.labels, tokens, rows);
  memory.output(p.positions, rows * sizeof *p.positions);
  memory.output(p.layout, s.batch * sizeof *p.layout);
  memory.output(p.out, rows * s.hidden * element);
  return with_variant(RowVariants<PromptEmbedding>{}, RowsKey{p.type, config.aligned}, [&]<class Kernel>(Kernel) {
    return run<Kernel>(&prompt_embedding_kernel<Kernel>, config.aligned, config.blocks, p, memory, stream);
  });
}

cudaError_t launch_prompt_embedding_backward(const PromptEmbeddingBackwardParams& p, const PromptBackwardConfig& config,
                                             cudaStream_t stream) {
  const PromptSizes& s = p.sizes;
  const size_t element = size_of(p.type);
  Memory memory;
  for (int64_t b = 0; b < s.batch; ++b) {
    memory.input(static_cast<const char*>(p.grad) + b * p.grad_batch_stride * element, element,
                 s.prompt_rows + s.tokens, s.hidden, p.grad_stride);
  }
  memory.input(p.layout, sizeof *p.layout, 1, s.batch, 0);
  add_indices(memory, p.ids, s.batch * s.tokens);
  add_indices(memory, p.task_ids, s.batch);
  memory.output(p.grad_prompt, s.tasks * s.prompt_rows * s.hidden * size_of(p.prompt_type));
  memory.output(p.grad_embeds, s.batch * s.tokens * s.hidden * element);
  memory.output(p.grad_weight, s.vocabulary * s.hidden * element);
  return with_variant(RowVariants<PromptEmbeddingBackward>{}, RowsKey{p.type, config.aligned},
                      [&]<class Kernel>(Kernel) {
                        return run<Kernel>(&prompt_embedding_backward_kernel<Kernel>, config.aligned, config.blocks(),
                                           p, memory, stream);
                      });
}

}  // namespace lk

#define CUDA CPU
#define lora_kernels_native lora_kernels_emulated_prompt
#include "../bind/prompt_embedding_cuda.cpp"
#undef CUDA

// Where some of the tensors are on another device than the others.
STABLE_TORCH_LIBRARY_IMPL(lora_kernels_emulated_prompt, Meta, m) {
  m.impl("prompt_embedding", TORCH_BOX(&lk::prompt_embedding));
  m.impl("prompt_embedding_backward", TORCH_BOX(&lk::prompt_embedding_backward));
}

PYBIND11_MODULE(_emu_prompt_embedding, m) { lk::define_launch(m); }
