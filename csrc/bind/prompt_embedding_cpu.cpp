// prompt_embedding and its backward on the CPU.
#include "../cpu/prompt_embedding.h"
#include "prompt_embedding.h"

namespace lk {
namespace {

constexpr int64_t kGrainBytes = 1 << 15;  // bytes of output that are worth a thread

template <class F>
void for_rows(int64_t rows, int64_t row_bytes, const F& f) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, row_bytes)), f);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prompt_embedding(
    Tensor prompt, std::optional<Tensor> input_ids, std::optional<Tensor> weight, std::optional<Tensor> inputs_embeds,
    std::optional<Tensor> attention_mask, std::optional<Tensor> labels, std::optional<Tensor> task_ids,
    std::optional<Tensor> prompt_lengths, bool left, std::string) {
  const PromptEmbeddingCall call = prompt_embedding_call(prompt, input_ids, weight, inputs_embeds, attention_mask,
                                                         labels, task_ids, prompt_lengths, left);
  const PromptEmbeddingParams& p = call.params;
  STD_TORCH_CHECK(cpu::prompt_layout(p), "prompt_embedding: an id, a task or a prompt length is out of range");
  for_rows(p.sizes.batch * (p.sizes.prompt_rows + p.sizes.tokens), p.sizes.hidden * call.source.element_size(),
           [&](int64_t begin, int64_t end) { cpu::prompt_rows(p, begin, end); });
  return call.outputs();
}

std::tuple<Tensor, Tensor, Tensor> prompt_embedding_backward(Tensor grad, Tensor layout,
                                                             std::optional<Tensor> input_ids,
                                                             std::optional<Tensor> task_ids, int64_t tasks,
                                                             int64_t prompt_rows, ScalarType prompt_dtype,
                                                             int64_t vocabulary, bool need_prompt, bool need_weight,
                                                             bool need_embeds, std::string) {
  const PromptEmbeddingBackwardCall call =
      prompt_embedding_backward_call(grad, layout, input_ids, task_ids, tasks, prompt_rows, prompt_dtype, vocabulary,
                                     need_prompt, need_weight, need_embeds);
  const PromptEmbeddingBackwardParams& p = call.params;
  STD_TORCH_CHECK(cpu::prompt_backward_fits(p), "prompt_embedding_backward: layout, an id or a task is out of range");
  const int64_t tokens = p.sizes.batch * p.sizes.tokens, row_bytes = p.sizes.hidden * call.grad.element_size();
  if (need_prompt) {
    for_rows(p.sizes.tasks * prompt_rows, p.sizes.batch * row_bytes,
             [&](int64_t begin, int64_t end) { cpu::prompt_grad_rows(p, begin, end); });
  }
  if (need_weight) {
    Tensor grad_weight = call.grad_weight;
    torch::stable::zero_(grad_weight);
    const std::vector<cpu::TokenOccurrence> sorted = cpu::sorted_tokens(p);
    for_rows(tokens, row_bytes, [&](int64_t begin, int64_t end) { cpu::weight_grad_rows(p, sorted, begin, end); });
  }
  if (need_embeds) {
    for_rows(tokens, row_bytes, [&](int64_t begin, int64_t end) { cpu::token_grad_rows(p, begin, end); });
  }
  return call.outputs();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CPU, m) {
  m.impl("prompt_embedding", TORCH_BOX(&prompt_embedding));
  m.impl("prompt_embedding_backward", TORCH_BOX(&prompt_embedding_backward));
}

}  // namespace lk
