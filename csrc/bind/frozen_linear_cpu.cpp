// frozen_linear and its input gradient on the CPU: the base GEMM of lora_linear alone.
#include <string>

#include "cpu_decode.h"
#include "cpu_gemm.h"
#include "lora_checks.h"

namespace lk {
namespace {

Tensor frozen_decode(const Tensor& rows, const Tensor& w, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(is_fp32(rows), "the decode schedule serves fp32");
  const Tensor weight = w.stride(1) == 1 ? w : torch::stable::contiguous(w);
  const Tensor y = new_empty_as(rows, {rows.size(0), weight.size(0)});
  const std::optional<Tensor> bias_row = bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
  LoraDecodeParams p = decode_params(rows, weight, mutable_floats(y));
  p.bias = bias_row ? floats(*bias_row) : nullptr;
  run_decode(p);
  return y;
}

Tensor frozen_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, std::string schedule) {
  check_frozen_linear(x, weight, bias);
  const bool upcast = schedule == "upcast";
  const Tensor rows = as_rows(x);
  if (schedule == "decode") return with_leading_sizes_of(frozen_decode(rows, weight, bias), x);
  if (schedule == "onednn") return with_leading_sizes_of(onednn_linear(rows, weight, bias), x);
  const Tensor y = new_empty_as(x, {rows.size(0), weight.size(0)});
  for_row_blocks(rows.size(0), upcast, [&](int64_t m0, int64_t m1) {
    const Tensor block = row_block(rows, m0, m1);
    linear(row_block(y, m0, m1), upcast ? cast(block, ScalarType::Float) : block, weight, bias, [](const auto&...) {});
  });
  return with_leading_sizes_of(y, x);
}

Tensor frozen_linear_backward(Tensor grad_y, Tensor weight, std::string schedule) {
  check_frozen_linear_backward(grad_y, weight);
  const bool upcast = schedule == "upcast";
  const Tensor rows = as_rows(grad_y);
  if (schedule == "onednn") return with_leading_sizes_of(onednn_linear(rows, transposed(weight), std::nullopt), grad_y);
  const Tensor grad_x = new_empty_as(grad_y, {rows.size(0), weight.size(1)});
  for_row_blocks(rows.size(0), upcast, [&](int64_t m0, int64_t m1) {
    const Tensor grad = row_block(rows, m0, m1);
    Tensor target = row_block(grad_x, m0, m1);
    if (!upcast) {
      linear_backward(target, grad, weight);
      return;
    }
    const Tensor sum = new_empty_as(grad, {m1 - m0, weight.size(1)}, ScalarType::Float);
    linear_backward(sum, cast(grad, ScalarType::Float), weight);
    torch::stable::copy_(target, sum);
  });
  return with_leading_sizes_of(grad_x, grad_y);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CPU, m) {
  m.impl("frozen_linear", TORCH_BOX(&frozen_linear));
  m.impl("frozen_linear_backward", TORCH_BOX(&frozen_linear_backward));
}

}  // namespace lk
