// cross_entropy_rows on the CPU, and the products of a head of 16 bits in fp32, which keep logits from being rounded.
#include "../cpu/kernels.h"
#include "cpu_gemm.h"
#include "cross_entropy_rows.h"

namespace lk {
namespace {

constexpr int64_t kGrain = 1 << 14;  // logits that are worth a thread

Tensor cross_entropy_rows(Tensor logits, Tensor labels, std::optional<Tensor> grad_losses, int64_t ignore_index,
                          double label_smoothing, double softcap, double logit_scale, ScalarType grad_dtype) {
  STD_TORCH_CHECK(grad_dtype == ScalarType::Float, "cross_entropy_rows: gradients on the CPU are float32");
  const CrossEntropyCall call =
      cross_entropy_call(logits, labels, grad_losses, ignore_index, label_smoothing, softcap, logit_scale, grad_dtype);
  const CrossEntropyParams& p = call.params;
  torch::stable::parallel_for(0, p.rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, p.columns)),
                              [&](int64_t begin, int64_t end) { cpu::kernels().cross_entropy_rows(p, begin, end); });
  return call.losses;
}

void check_wide(const Tensor& rows, const Tensor& weight, int64_t depth_dim) {
  STD_TORCH_CHECK(
      rows.dim() == 2 && is_fp32(rows) && weight.dim() == 2 && rows.size(1) == weight.size(depth_dim),
      "wide_linear: x, or its backward's grad_y, must be float32 [rows, k], or [rows, n], of a weight [n, k]");
}

// x Wᵀ + bias for an fp32 x, whatever W and bias are rounded to.
Tensor wide_linear(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  check_wide(x, weight, 1);
  return base_forward(x, PlainMatrix(weight), bias, "aten");
}

Tensor wide_linear_backward(Tensor grad_y, Tensor weight) {
  check_wide(grad_y, weight, 0);
  return base_backward(grad_y, PlainMatrix(weight), "aten");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CPU, m) {
  m.impl("cross_entropy_rows", TORCH_BOX(&cross_entropy_rows));
  m.impl("wide_linear", TORCH_BOX(&wide_linear));
  m.impl("wide_linear_backward", TORCH_BOX(&wide_linear_backward));
}

}  // namespace lk
