// prompt_embedding and its backward on the CPU.
#include <string>
#include <tuple>

#include "../cpu/prompt_embedding.h"
#include "aten.h"

namespace lk {
namespace {

constexpr int64_t kGrainBytes = 1 << 15;  // bytes of output that are worth a thread
constexpr uint64_t kIgnoredLabel = static_cast<uint64_t>(int64_t{-100});

static_assert(sizeof(PromptLayout) == 3 * sizeof(int64_t), "a row of the layout tensor is a PromptLayout");

FloatType float_type(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return FloatType::kFloat32;
    case ScalarType::BFloat16:
      return FloatType::kBFloat16;
    case ScalarType::Half:
      return FloatType::kFloat16;
    case ScalarType::Double:
      return FloatType::kFloat64;
    default:
      STD_TORCH_CHECK(false, "prompt_embedding: not a floating-point type of the CPU kernel");
  }
}

// The bits of 1, and those that make an element non-zero.
std::tuple<uint64_t, uint64_t> mask_bits(const Tensor& mask) {
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

std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  return !t || t->is_contiguous() ? t : std::optional<Tensor>(torch::stable::contiguous(*t));
}

// Rows as the kernels read them: any strides but the last one's.
Tensor with_contiguous_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.stride(last) == 1 || t.size(last) <= 1 ? t : torch::stable::contiguous(t);
}

// An argument that was not given fits.
bool has_sizes(const std::optional<Tensor>& t, std::initializer_list<int64_t> sizes) {
  return !t || std::equal(t->sizes().begin(), t->sizes().end(), sizes.begin(), sizes.end());
}

IndexArray index_array(const std::optional<Tensor>& t) {
  return t ? IndexArray{t->const_data_ptr(), t->scalar_type() == ScalarType::Long} : IndexArray{};
}

TokenColumn token_column(const std::optional<Tensor>& tokens, const Tensor& out, uint64_t prompt, uint64_t unused) {
  return {tokens ? tokens->const_data_ptr() : nullptr, out.mutable_data_ptr(), static_cast<int64_t>(out.element_size()),
          prompt, unused};
}

template <class F>
void for_rows(int64_t rows, int64_t row_bytes, const F& f) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, row_bytes)), f);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prompt_embedding(
    Tensor prompt, std::optional<Tensor> input_ids, std::optional<Tensor> weight, std::optional<Tensor> inputs_embeds,
    std::optional<Tensor> attention_mask, std::optional<Tensor> labels, std::optional<Tensor> task_ids,
    std::optional<Tensor> prompt_lengths, bool left, std::string) {
  // Whatever had to be copied to become contiguous lives here until the end of the call.
  const Tensor source = with_contiguous_rows(input_ids ? *weight : *inputs_embeds), rows = with_contiguous_rows(prompt);
  const std::optional<Tensor> ids = contiguous(input_ids), mask = contiguous(attention_mask),
                              label = contiguous(labels), tasks = contiguous(task_ids),
                              lengths = contiguous(prompt_lengths);
  const Tensor& tokens = ids ? *ids : source;
  const int64_t batch = tokens.size(0), dim = rows.dim(), hidden = rows.size(dim - 1);
  const int64_t out_rows = rows.size(dim - 2) + tokens.size(1);

  STD_TORCH_CHECK(source.size(source.dim() - 1) == hidden && (dim == 3) == tasks.has_value() &&
                      has_sizes(mask, {batch, tokens.size(1)}) && has_sizes(label, {batch, tokens.size(1)}) &&
                      has_sizes(tasks, {batch}) && has_sizes(lengths, {batch}),
                  "prompt_embedding: shapes do not fit");

  const Tensor out = new_empty_as(source, {batch, out_rows, hidden});
  const Tensor out_mask = new_empty_as(source, {batch, out_rows}, mask ? mask->scalar_type() : ScalarType::Long);
  const Tensor positions = new_empty_as(source, {batch, out_rows}, ScalarType::Long);
  const Tensor out_labels =
      label ? new_empty_as(*label, {batch, out_rows}) : new_empty_as(source, {0}, ScalarType::Long);
  const Tensor layout = new_empty_as(source, {batch, 3}, ScalarType::Long);
  const auto [one, significant] = mask_bits(out_mask);

  PromptEmbeddingParams p{};
  p.sizes = {batch, tokens.size(1), rows.size(dim - 2), hidden, dim == 3 ? rows.size(0) : 1, ids ? source.size(0) : 0};
  p.type = float_type(source);
  p.prompt_type = float_type(rows);
  p.source = source.const_data_ptr();
  p.source_batch_stride = ids ? 0 : source.stride(0);
  p.source_stride = source.stride(ids ? 0 : 1);
  p.ids = index_array(ids);
  p.prompt = rows.const_data_ptr();
  p.prompt_task_stride = dim == 3 ? rows.stride(0) : 0;
  p.prompt_stride = rows.stride(dim - 2);
  p.task_ids = index_array(tasks);
  p.prompt_lengths = index_array(lengths);
  p.left = left;
  p.mask = token_column(mask, out_mask, one, 0);
  if (label) p.labels = token_column(label, out_labels, kIgnoredLabel, kIgnoredLabel);
  p.mask_significant = significant;
  p.positions = static_cast<int64_t*>(positions.mutable_data_ptr());
  p.layout = static_cast<PromptLayout*>(layout.mutable_data_ptr());
  p.out = out.mutable_data_ptr();

  STD_TORCH_CHECK(cpu::prompt_layout(p), "prompt_embedding: an id, a task or a prompt length is out of range");
  for_rows(batch * out_rows, hidden * source.element_size(),
           [&](int64_t begin, int64_t end) { cpu::prompt_rows(p, begin, end); });
  return {out, out_mask, positions, out_labels, layout};
}

std::tuple<Tensor, Tensor, Tensor> prompt_embedding_backward(Tensor grad, Tensor layout,
                                                             std::optional<Tensor> input_ids,
                                                             std::optional<Tensor> task_ids, int64_t tasks,
                                                             int64_t prompt_rows, ScalarType prompt_dtype,
                                                             int64_t vocabulary, bool need_prompt, bool need_weight,
                                                             bool need_embeds, std::string) {
  const Tensor rows = with_contiguous_rows(grad);
  const std::optional<Tensor> places = contiguous(layout), ids = contiguous(input_ids), task = contiguous(task_ids);
  const int64_t batch = rows.size(0), tokens = rows.size(1) - prompt_rows, hidden = rows.size(2);
  STD_TORCH_CHECK(tokens >= 0 && has_sizes(places, {batch, 3}) && (ids || !need_weight) &&
                      has_sizes(ids, {batch, tokens}) && has_sizes(task, {batch}),
                  "prompt_embedding_backward: shapes do not fit");

  Tensor grad_prompt = new_empty_as(rows, {0}, prompt_dtype), grad_weight = new_empty_as(rows, {0});
  Tensor grad_embeds = new_empty_as(rows, {0});
  if (need_prompt) {
    grad_prompt = tasks > 0 ? new_empty_as(rows, {tasks, prompt_rows, hidden}, prompt_dtype)
                            : new_empty_as(rows, {prompt_rows, hidden}, prompt_dtype);
  }
  if (need_weight) {
    grad_weight = new_empty_as(rows, {vocabulary, hidden});
    torch::stable::zero_(grad_weight);
  }
  if (need_embeds) grad_embeds = new_empty_as(rows, {batch, tokens, hidden});

  PromptEmbeddingBackwardParams p{};
  p.sizes = {batch, tokens, prompt_rows, hidden, std::max<int64_t>(tasks, 1), vocabulary};
  p.type = float_type(rows);
  p.prompt_type = float_type(grad_prompt);
  p.grad = rows.const_data_ptr();
  p.grad_batch_stride = rows.stride(0);
  p.grad_stride = rows.stride(1);
  p.layout = static_cast<const PromptLayout*>(places->const_data_ptr());
  p.ids = index_array(ids);
  p.task_ids = index_array(task);
  p.grad_prompt = grad_prompt.mutable_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr();
  p.grad_embeds = grad_embeds.mutable_data_ptr();

  STD_TORCH_CHECK(cpu::prompt_backward_fits(p), "prompt_embedding_backward: layout, an id or a task is out of range");
  const int64_t row_bytes = hidden * rows.element_size();
  if (need_prompt) {
    for_rows(p.sizes.tasks * prompt_rows, batch * row_bytes,
             [&](int64_t begin, int64_t end) { cpu::prompt_grad_rows(p, begin, end); });
  }
  if (need_weight) {
    const std::vector<cpu::TokenOccurrence> sorted = cpu::sorted_tokens(p);
    for_rows(batch * tokens, row_bytes,
             [&](int64_t begin, int64_t end) { cpu::weight_grad_rows(p, sorted, begin, end); });
  }
  if (need_embeds) {
    for_rows(batch * tokens, row_bytes, [&](int64_t begin, int64_t end) { cpu::token_grad_rows(p, begin, end); });
  }
  return {grad_prompt, grad_weight, grad_embeds};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CPU, m) {
  m.impl("prompt_embedding", TORCH_BOX(&prompt_embedding));
  m.impl("prompt_embedding_backward", TORCH_BOX(&prompt_embedding_backward));
}

}  // namespace lk
