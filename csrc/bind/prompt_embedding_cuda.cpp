// prompt_embedding and its gradients on CUDA.
#include <cstdlib>
#include <string_view>

#include "../launch/prompt_embedding.h"
#include "cuda_device.h"
#include "prompt_embedding.h"

namespace lk {
namespace {

// Indices are on the device, and checking them on the host would wait for it. With LORA_KERNELS_DEVICE_ASSERT=1 the
// kernels stop at one that is out of range; without, an id or a task gives rows of NaN, and a length is the nearest.
bool trap_outside() {
  const char* const value = std::getenv("LORA_KERNELS_DEVICE_ASSERT");
  return value != nullptr && std::string_view(value) == "1";
}

void check_types(FloatType type, FloatType prompt_type) {
  STD_TORCH_CHECK(
      gpu_converts(type, prompt_type),
      "prompt_embedding: the CUDA kernels serve float32, bfloat16 and float16, with a prompt of the same type or "
      "float32");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prompt_embedding(
    Tensor prompt, std::optional<Tensor> input_ids, std::optional<Tensor> weight, std::optional<Tensor> inputs_embeds,
    std::optional<Tensor> attention_mask, std::optional<Tensor> labels, std::optional<Tensor> task_ids,
    std::optional<Tensor> prompt_lengths, bool left, std::string) {
  const CudaCall device(prompt);
  PromptEmbeddingCall call = prompt_embedding_call(prompt, input_ids, weight, inputs_embeds, attention_mask, labels,
                                                   task_ids, prompt_lengths, left);
  PromptEmbeddingParams& p = call.params;
  const PromptSizes& sizes = p.sizes;
  check_types(p.type, p.prompt_type);
  STD_TORCH_CHECK(
      (!input_ids || sizes.vocabulary > 0 || sizes.batch * sizes.tokens == 0) && (sizes.tasks > 0 || sizes.batch == 0),
      "prompt_embedding: no row of an empty table can be taken");
  const PromptEmbeddingConfig config = prompt_embedding_config(
      sizes, rows_aligned(call.source) && rows_aligned(call.prompt), left && attention_mask.has_value());
  p.trap_outside = trap_outside();
  p.rows_per_block = config.rows_per_block;
  check_cuda(launch_prompt_embedding(p, config, device.stream), "prompt_embedding");
  return call.outputs();
}

std::tuple<Tensor, Tensor, Tensor> prompt_embedding_backward(Tensor grad, Tensor layout,
                                                             std::optional<Tensor> input_ids,
                                                             std::optional<Tensor> task_ids, int64_t tasks,
                                                             int64_t prompt_rows, ScalarType prompt_dtype,
                                                             int64_t vocabulary, bool need_prompt, bool need_weight,
                                                             bool need_embeds, std::string) {
  const CudaCall device(grad);
  PromptEmbeddingBackwardCall call =
      prompt_embedding_backward_call(grad, layout, input_ids, task_ids, tasks, prompt_rows, prompt_dtype, vocabulary,
                                     need_prompt, need_weight, need_embeds);
  PromptEmbeddingBackwardParams& p = call.params;
  check_types(p.type, p.prompt_type);
  const PromptBackwardConfig config =
      prompt_backward_config(p.sizes, rows_aligned(call.grad), need_prompt, need_weight, need_embeds);
  p.trap_outside = trap_outside();
  p.prompt_blocks = static_cast<int32_t>(config.prompt_blocks);
  p.embeds_blocks = static_cast<int32_t>(config.embeds_blocks);
  check_cuda(launch_prompt_embedding_backward(p, config, device.stream), "prompt_embedding_backward");
  return call.outputs();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CUDA, m) {
  m.impl("prompt_embedding", TORCH_BOX(&prompt_embedding));
  m.impl("prompt_embedding_backward", TORCH_BOX(&prompt_embedding_backward));
}

}  // namespace lk
