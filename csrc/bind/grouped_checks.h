// What the kernels of grouped_lora_linear take for granted about their operands.
#pragma once

#include "lora_checks.h"

namespace lk {

inline void check_grouped_lora_linear(const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                                      const Tensor& offsets, const std::optional<Tensor>& bias,
                                      const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) >= 1 && offsets.scalar_type() == ScalarType::Int,
                  "offsets must be [groups], int32");
  STD_TORCH_CHECK(is_beside(x, offsets), "offsets must be on x's device");
  const int64_t groups = offsets.size(0), dim = weight.dim();
  STD_TORCH_CHECK(dim == 2 || (dim == 3 && weight.size(0) == groups), "weight must be [n, k] or [groups, n, k]");
  const int64_t n = weight.size(dim - 2), k = weight.size(dim - 1);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == k, "x must be [rows, k] and weight [n, k] or [groups, n, k]");
  STD_TORCH_CHECK(x.scalar_type() == weight.scalar_type(), "weight must have x's dtype");
  STD_TORCH_CHECK(is_beside(x, weight), "weight must be on x's device");
  STD_TORCH_CHECK(lora_A.dim() == 3 && lora_A.size(0) == groups && lora_A.size(1) >= 1 && lora_A.size(2) == k,
                  "lora_A must be [groups, rank, k], with a rank of at least 1");
  STD_TORCH_CHECK(
      lora_B.dim() == 3 && lora_B.size(0) == groups && lora_B.size(1) == n && lora_B.size(2) == lora_A.size(1),
      "lora_B must be [groups, n, rank]");
  STD_TORCH_CHECK(lora_A.scalar_type() == lora_B.scalar_type(), "lora_B must have lora_A's dtype");
  STD_TORCH_CHECK(is_beside(x, lora_A), "lora_A must be on x's device");
  STD_TORCH_CHECK(is_beside(x, lora_B), "lora_B must be on x's device");
  if (bias) {
    const int64_t last = bias->dim() - 1;
    STD_TORCH_CHECK((last == 0 || (last == 1 && bias->size(0) == groups)) && bias->size(last) == n,
                    "bias must be [n] or [groups, n]");
    STD_TORCH_CHECK(bias->scalar_type() == x.scalar_type(), "bias must have x's dtype");
    STD_TORCH_CHECK(is_beside(x, bias), "bias must be on x's device");
  }
  if (seed) check_seed(*seed);
  STD_TORCH_CHECK(is_beside(x, seed), "seed must be on x's device");
}

inline void check_grouped_lora_linear_backward(const Tensor& grad_y, const Tensor& x, const Tensor& s,
                                               const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                                               const Tensor& offsets, const std::optional<Tensor>& seed) {
  check_grouped_lora_linear(x, weight, lora_A, lora_B, offsets, std::nullopt, seed);
  check_gradient(grad_y, x, s, weight.size(weight.dim() - 2), lora_A.size(1));
}

}  // namespace lk
