// prompt_embedding and its gradients on any device: tensors to Params, and the outputs.
#pragma once

#include <tuple>
#include <utility>

#include "../params/prompt_embedding.h"
#include "rows.h"

namespace lk {

static_assert(sizeof(PromptLayout) == 3 * sizeof(int64_t), "a row of the layout tensor is a PromptLayout");

// The bits of 1, and those that make an element non-zero.
inline std::tuple<uint64_t, uint64_t> mask_bits(const Tensor& mask) {
  switch (mask.scalar_type()) {
    case ScalarType::Float:
      return {0x3F800000u, 0x7FFFFFFFu};
    case ScalarType::BFloat16:
      return {0x3F80u, 0x7FFFu};
    case ScalarType::Half:
      return {0x3C00u, 0x7FFFu};
    case ScalarType::Double:
      return {0x3FF0000000000000u, 0x7FFFFFFFFFFFFFFFu};
    default:
      return {1u, ~uint64_t{0}};
  }
}

// An argument that was not given fits.
inline bool has_sizes(const std::optional<Tensor>& t, std::initializer_list<int64_t> sizes) {
  return !t || std::equal(t->sizes().begin(), t->sizes().end(), sizes.begin(), sizes.end());
}

inline IndexArray index_array(const std::optional<Tensor>& t) {
  return t ? IndexArray{t->const_data_ptr(), t->scalar_type() == ScalarType::Long} : IndexArray{};
}

inline TokenColumn token_column(const std::optional<Tensor>& tokens, const Tensor& out, uint64_t prompt,
                                uint64_t unused) {
  return {tokens ? tokens->const_data_ptr() : nullptr, out.mutable_data_ptr(), static_cast<int64_t>(out.element_size()),
          prompt, unused};
}

// What the kernels take for granted about their operands, as in lora_checks.h. An index array has a number for each
// sample, or for each of its tokens.
inline void check_indices(const char* op, const char* name, const std::optional<Tensor>& t,
                          std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(has_sizes(t, sizes) && (!t || is_integer(*t)), op, ": ", name, " must be ",
                  sizes.size() == 2 ? "[batch, tokens]" : "[batch]", ", int32 or int64");
}

inline void check_prompt_embedding(const Tensor& prompt, const std::optional<Tensor>& input_ids,
                                   const std::optional<Tensor>& weight, const std::optional<Tensor>& inputs_embeds,
                                   const std::optional<Tensor>& attention_mask, const std::optional<Tensor>& labels,
                                   const std::optional<Tensor>& task_ids, const std::optional<Tensor>& prompt_lengths) {
  STD_TORCH_CHECK(input_ids ? weight.has_value() : inputs_embeds.has_value(),
                  "prompt_embedding: input_ids with weight, or inputs_embeds, must be given");
  STD_TORCH_CHECK(
      prompt.dim() == (task_ids ? 3 : 2),
      "prompt_embedding: prompt must be [prompt_rows, hidden], or with task_ids [tasks, prompt_rows, hidden]");
  const int64_t hidden = prompt.size(prompt.dim() - 1);
  if (input_ids) {
    STD_TORCH_CHECK(weight->dim() == 2 && weight->size(1) == hidden,
                    "prompt_embedding: weight must be [vocabulary, hidden], as wide as prompt");
    STD_TORCH_CHECK(input_ids->dim() == 2, "prompt_embedding: input_ids must be [batch, tokens]");
  } else {
    STD_TORCH_CHECK(inputs_embeds->dim() == 3 && inputs_embeds->size(2) == hidden,
                    "prompt_embedding: inputs_embeds must be [batch, tokens, hidden], as wide as prompt");
  }
  const Tensor& text = input_ids ? *input_ids : *inputs_embeds;
  const int64_t batch = text.size(0), tokens = text.size(1);
  check_indices("prompt_embedding", "input_ids", input_ids, {batch, tokens});
  check_indices("prompt_embedding", "task_ids", task_ids, {batch});
  check_indices("prompt_embedding", "prompt_lengths", prompt_lengths, {batch});
  STD_TORCH_CHECK(has_sizes(attention_mask, {batch, tokens}),
                  "prompt_embedding: attention_mask must be [batch, tokens]");
  STD_TORCH_CHECK(has_sizes(labels, {batch, tokens}), "prompt_embedding: labels must be [batch, tokens]");
  const std::pair<const char*, const std::optional<Tensor>*> others[] = {
      {"input_ids", &input_ids},           {"weight", &weight}, {"inputs_embeds", &inputs_embeds},
      {"attention_mask", &attention_mask}, {"labels", &labels}, {"task_ids", &task_ids},
      {"prompt_lengths", &prompt_lengths}};
  for (const auto& [name, t] : others) {
    STD_TORCH_CHECK(is_beside(prompt, *t), "prompt_embedding: ", name, " must be on prompt's device");
  }
}

// One forward. Whatever had to be copied to become contiguous lives as long as the call.
struct PromptEmbeddingCall {
  Tensor source, prompt;
  std::optional<Tensor> ids, mask, labels, task_ids, prompt_lengths;
  Tensor out, out_mask, positions, out_labels, layout;
  PromptEmbeddingParams params;

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> outputs() const {
    return {out, out_mask, positions, out_labels, layout};
  }
};

inline PromptEmbeddingCall prompt_embedding_call(const Tensor& prompt, const std::optional<Tensor>& input_ids,
                                                 const std::optional<Tensor>& weight,
                                                 const std::optional<Tensor>& inputs_embeds,
                                                 const std::optional<Tensor>& attention_mask,
                                                 const std::optional<Tensor>& labels,
                                                 const std::optional<Tensor>& task_ids,
                                                 const std::optional<Tensor>& prompt_lengths, bool left) {
  check_prompt_embedding(prompt, input_ids, weight, inputs_embeds, attention_mask, labels, task_ids, prompt_lengths);
  constexpr auto kIgnoredLabel = static_cast<uint64_t>(int64_t{-100});
  const Tensor source = with_contiguous_rows(input_ids ? *weight : *inputs_embeds), rows = with_contiguous_rows(prompt);
  const Tensor& tokens = input_ids ? *input_ids : source;
  const int64_t batch = tokens.size(0), dim = rows.dim(), hidden = rows.size(dim - 1);
  const int64_t out_rows = rows.size(dim - 2) + tokens.size(1);

  PromptEmbeddingCall call{
      .source = source,
      .prompt = rows,
      .ids = contiguous(input_ids),
      .mask = contiguous(attention_mask),
      .labels = contiguous(labels),
      .task_ids = contiguous(task_ids),
      .prompt_lengths = contiguous(prompt_lengths),
      .out = new_empty_as(source, {batch, out_rows, hidden}),
      .out_mask =
          new_empty_as(source, {batch, out_rows}, attention_mask ? attention_mask->scalar_type() : ScalarType::Long),
      .positions = new_empty_as(source, {batch, out_rows}, ScalarType::Long),
      .out_labels = labels ? new_empty_as(*labels, {batch, out_rows}) : new_empty_as(source, {0}, ScalarType::Long),
      .layout = new_empty_as(source, {batch, 3}, ScalarType::Long),
      .params = {}};
  const auto [one, significant] = mask_bits(call.out_mask);

  PromptEmbeddingParams& p = call.params;
  p.sizes = {
      batch, tokens.size(1), rows.size(dim - 2), hidden, dim == 3 ? rows.size(0) : 1, input_ids ? source.size(0) : 0};
  p.type = float_type(source);
  p.prompt_type = float_type(rows);
  p.source = source.const_data_ptr();
  p.source_batch_stride = input_ids ? 0 : source.stride(0);
  p.source_stride = source.stride(input_ids ? 0 : 1);
  p.ids = index_array(call.ids);
  p.prompt = rows.const_data_ptr();
  p.prompt_task_stride = dim == 3 ? rows.stride(0) : 0;
  p.prompt_stride = rows.stride(dim - 2);
  p.task_ids = index_array(call.task_ids);
  p.prompt_lengths = index_array(call.prompt_lengths);
  p.left = left;
  p.mask = token_column(call.mask, call.out_mask, one, 0);
  if (labels) p.labels = token_column(call.labels, call.out_labels, kIgnoredLabel, kIgnoredLabel);
  p.mask_significant = significant;
  p.positions = static_cast<int64_t*>(call.positions.mutable_data_ptr());
  p.layout = static_cast<PromptLayout*>(call.layout.mutable_data_ptr());
  p.out = call.out.mutable_data_ptr();
  return call;
}

inline void check_prompt_embedding_backward(const Tensor& grad, const Tensor& layout,
                                            const std::optional<Tensor>& input_ids,
                                            const std::optional<Tensor>& task_ids, int64_t prompt_rows,
                                            bool need_weight) {
  STD_TORCH_CHECK(grad.dim() == 3 && prompt_rows >= 0 && prompt_rows <= grad.size(1),
                  "prompt_embedding_backward: grad must be [batch, prompt_rows + tokens, hidden]");
  const int64_t batch = grad.size(0), tokens = grad.size(1) - prompt_rows;
  STD_TORCH_CHECK(has_sizes(layout, {batch, 3}) && layout.scalar_type() == ScalarType::Long,
                  "prompt_embedding_backward: layout must be [batch, 3], int64");
  STD_TORCH_CHECK(input_ids || !need_weight,
                  "prompt_embedding_backward: the gradient of weight takes input_ids, which must be given");
  check_indices("prompt_embedding_backward", "input_ids", input_ids, {batch, tokens});
  check_indices("prompt_embedding_backward", "task_ids", task_ids, {batch});
  STD_TORCH_CHECK(is_beside(grad, layout), "prompt_embedding_backward: layout must be on grad's device");
  STD_TORCH_CHECK(is_beside(grad, input_ids), "prompt_embedding_backward: input_ids must be on grad's device");
  STD_TORCH_CHECK(is_beside(grad, task_ids), "prompt_embedding_backward: task_ids must be on grad's device");
}

// One backward. Gradients that are not wanted are empty, and null in params.
struct PromptEmbeddingBackwardCall {
  Tensor grad;
  std::optional<Tensor> layout, ids, task_ids;
  Tensor grad_prompt, grad_weight, grad_embeds;
  PromptEmbeddingBackwardParams params;

  std::tuple<Tensor, Tensor, Tensor> outputs() const { return {grad_prompt, grad_weight, grad_embeds}; }
};

inline PromptEmbeddingBackwardCall prompt_embedding_backward_call(const Tensor& grad, const Tensor& layout,
                                                                  const std::optional<Tensor>& input_ids,
                                                                  const std::optional<Tensor>& task_ids, int64_t tasks,
                                                                  int64_t prompt_rows, ScalarType prompt_dtype,
                                                                  int64_t vocabulary, bool need_prompt,
                                                                  bool need_weight, bool need_embeds) {
  check_prompt_embedding_backward(grad, layout, input_ids, task_ids, prompt_rows, need_weight);
  const Tensor rows = with_contiguous_rows(grad);
  const int64_t batch = rows.size(0), tokens = rows.size(1) - prompt_rows, hidden = rows.size(2);

  const auto grad_prompt = [&] {
    if (!need_prompt) return new_empty_as(rows, {0}, prompt_dtype);
    return tasks > 0 ? new_empty_as(rows, {tasks, prompt_rows, hidden}, prompt_dtype)
                     : new_empty_as(rows, {prompt_rows, hidden}, prompt_dtype);
  };
  PromptEmbeddingBackwardCall call{
      .grad = rows,
      .layout = contiguous(layout),
      .ids = contiguous(input_ids),
      .task_ids = contiguous(task_ids),
      .grad_prompt = grad_prompt(),
      .grad_weight = need_weight ? new_empty_as(rows, {vocabulary, hidden}) : new_empty_as(rows, {0}),
      .grad_embeds = need_embeds ? new_empty_as(rows, {batch, tokens, hidden}) : new_empty_as(rows, {0}),
      .params = {}};

  PromptEmbeddingBackwardParams& p = call.params;
  p.sizes = {batch, tokens, prompt_rows, hidden, std::max<int64_t>(tasks, 1), vocabulary};
  p.type = float_type(rows);
  p.prompt_type = float_type(call.grad_prompt);
  p.grad = rows.const_data_ptr();
  p.grad_batch_stride = rows.stride(0);
  p.grad_stride = rows.stride(1);
  p.layout = static_cast<const PromptLayout*>(call.layout->const_data_ptr());
  p.ids = index_array(call.ids);
  p.task_ids = index_array(call.task_ids);
  if (need_prompt) p.grad_prompt = call.grad_prompt.mutable_data_ptr();
  if (need_weight) p.grad_weight = call.grad_weight.mutable_data_ptr();
  if (need_embeds) p.grad_embeds = call.grad_embeds.mutable_data_ptr();
  return call;
}

}  // namespace lk
