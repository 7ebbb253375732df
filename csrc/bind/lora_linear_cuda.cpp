// lora_linear and its gradients on CUDA.
#include "lora_call.h"

namespace lk {
namespace {

Tensor weight_rows(const Tensor& weight) { return in_columns(weight) ? weight : matrix_of(weight); }

std::tuple<Tensor, Tensor> lora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B,
                                       std::optional<Tensor> bias, std::optional<Tensor> seed, double scaling,
                                       double dropout_p, std::string schedule) {
  check_lora_linear(x, weight, lora_A, lora_B, bias, seed);
  check_type(x, "lora_linear");
  const CudaCall call(x);
  const Tensor w = weight_rows(weight);
  const Operands operands(x, ref_of(w), in_columns(weight), lora_A, lora_B, bias, seed, scaling, dropout_p);
  return lora_forward(x, operands, call, wanted(schedule),
                      [&](const Tensor& y) { accumulate_product(y, operands.x, transposed(w)); });
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(Tensor grad_y, Tensor x, Tensor s, Tensor weight, Tensor lora_A,
                                                        Tensor lora_B, std::optional<Tensor> seed, double scaling,
                                                        double dropout_p, bool need_x, bool need_A, bool need_B,
                                                        std::string schedule) {
  check_lora_linear_backward(grad_y, x, s, weight, lora_A, lora_B, seed);
  check_type(x, "lora_linear_backward");
  const CudaCall call(x);
  const Tensor gy = matrix_of(grad_y), w = weight_rows(weight);
  const Operands operands(x, ref_of(w), in_columns(weight), lora_A, lora_B, std::nullopt, seed, scaling, dropout_p);
  return lora_backward(x, lora_A, gy, s, operands, need_x, need_A, need_B, call, wanted(schedule),
                       [&](const Tensor& grad_x) { accumulate_product(grad_x, gy, w); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CUDA, m) {
  m.impl("lora_linear", TORCH_BOX(&lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward));
}

}  // namespace lk
