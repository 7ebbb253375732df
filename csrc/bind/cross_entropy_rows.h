// cross_entropy_rows on any device: tensors to Params, and the losses.
#pragma once

#include "../params/cross_entropy_rows.h"
#include "rows.h"

namespace lk {

struct CrossEntropyCall {
  Tensor logits, labels;
  std::optional<Tensor> grad_losses;
  Tensor losses;
  CrossEntropyParams params;
};

inline CrossEntropyCall cross_entropy_call(const Tensor& logits, const Tensor& labels,
                                           const std::optional<Tensor>& grad_losses, int64_t ignore_index,
                                           double label_smoothing, double softcap, double logit_scale,
                                           ScalarType grad_dtype) {
  STD_TORCH_CHECK(logits.dim() == 2 && is_fp32(logits) && (logits.stride(1) == 1 || logits.size(1) <= 1),
                  "cross_entropy_rows: logits must be [rows, columns], float32 with unit column stride");
  const int64_t rows = logits.size(0);
  STD_TORCH_CHECK(logits.stride(0) >= logits.size(1) || rows <= 1,
                  "cross_entropy_rows: rows of logits must not overlap");
  STD_TORCH_CHECK(labels.dim() == 1 && labels.size(0) == rows && labels.scalar_type() == ScalarType::Long,
                  "cross_entropy_rows: labels must be [rows], int64");
  STD_TORCH_CHECK(!grad_losses || (grad_losses->dim() == 1 && grad_losses->size(0) == rows && is_fp32(*grad_losses)),
                  "cross_entropy_rows: grad_losses must be [rows], float32");
  STD_TORCH_CHECK(is_beside(logits, labels), "cross_entropy_rows: labels must be on logits' device");
  STD_TORCH_CHECK(is_beside(logits, grad_losses), "cross_entropy_rows: grad_losses must be on logits' device");
  CrossEntropyCall call{.logits = logits,
                        .labels = with_contiguous_rows(labels),
                        .grad_losses = grad_losses,
                        .losses = new_empty_as(logits, {rows}),
                        .params = {}};
  if (grad_losses) call.grad_losses = with_contiguous_rows(*grad_losses);
  call.params = {.logits = static_cast<float*>(call.logits.mutable_data_ptr()),
                 .stride = logits.stride(0),
                 .labels = static_cast<const int64_t*>(call.labels.const_data_ptr()),
                 .grad_losses = grad_losses ? static_cast<const float*>(call.grad_losses->const_data_ptr()) : nullptr,
                 .losses = static_cast<float*>(call.losses.mutable_data_ptr()),
                 .rows = rows,
                 .columns = logits.size(1),
                 .ignore_index = ignore_index,
                 .label_smoothing = static_cast<float>(label_smoothing),
                 .softcap = static_cast<float>(softcap),
                 .logit_scale = static_cast<float>(logit_scale),
                 .grad_type = float_type(grad_dtype)};
  return call;
}

}  // namespace lk
