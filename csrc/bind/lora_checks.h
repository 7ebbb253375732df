// What the kernels of lora_linear, frozen_linear and dropout_mask take for granted about their operands. The package's
// functions check more and say what is wrong with which argument; the registered ops can be called without them.
#pragma once

#include "aten.h"

namespace lk {

inline void check_bias(const Tensor& x, int64_t n, const std::optional<Tensor>& bias) {
  if (!bias) return;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, "bias must be [n]");
  STD_TORCH_CHECK(bias->scalar_type() == x.scalar_type(), "bias must have x's dtype");
  STD_TORCH_CHECK(is_beside(x, bias), "bias must be on x's device");
}

inline void check_frozen_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() > 0 && weight.dim() == 2 && x.size(x.dim() - 1) == weight.size(1),
                  "x must be [..., k] and weight [n, k]");
  STD_TORCH_CHECK(x.scalar_type() == weight.scalar_type(), "weight must have x's dtype");
  STD_TORCH_CHECK(is_beside(x, weight), "weight must be on x's device");
  check_bias(x, weight.size(0), bias);
}

inline void check_seed(const Tensor& seed) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "seed must be one int64 number");
}

// The adapter of a weight [n, k].
inline void check_adapter(const Tensor& x, int64_t n, int64_t k, const Tensor& lora_A, const Tensor& lora_B,
                          const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(lora_A.dim() == 2 && lora_A.size(0) >= 1 && lora_A.size(1) == k,
                  "lora_A must be [rank, k], with a rank of at least 1");
  STD_TORCH_CHECK(lora_B.dim() == 2 && lora_B.size(0) == n && lora_B.size(1) == lora_A.size(0),
                  "lora_B must be [n, rank]");
  STD_TORCH_CHECK(lora_A.scalar_type() == lora_B.scalar_type(), "lora_B must have lora_A's dtype");
  STD_TORCH_CHECK(is_beside(x, lora_A), "lora_A must be on x's device");
  STD_TORCH_CHECK(is_beside(x, lora_B), "lora_B must be on x's device");
  if (seed) check_seed(*seed);
  STD_TORCH_CHECK(is_beside(x, seed), "seed must be on x's device");
}

inline void check_lora_linear(const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                              const std::optional<Tensor>& bias, const std::optional<Tensor>& seed) {
  check_frozen_linear(x, weight, bias);
  check_adapter(x, weight.size(0), weight.size(1), lora_A, lora_B, seed);
}

// Whether `rows` is [..., columns] with x's leading sizes.
inline bool has_rows_of(const Tensor& x, const Tensor& rows, int64_t columns) {
  const int64_t last = x.dim() - 1;
  if (rows.dim() != x.dim() || rows.size(last) != columns) return false;
  for (int64_t d = 0; d < last; ++d) {
    if (rows.size(d) != x.size(d)) return false;
  }
  return true;
}

// What else the backward of a weight of n rows is given.
inline void check_gradient(const Tensor& grad_y, const Tensor& x, const Tensor& s, int64_t n, int64_t rank) {
  STD_TORCH_CHECK(has_rows_of(x, grad_y, n), "grad_y must be [..., n], with x's leading sizes");
  STD_TORCH_CHECK(has_rows_of(x, s, rank), "s must be [..., rank], with x's leading sizes");
  STD_TORCH_CHECK(grad_y.scalar_type() == x.scalar_type() && s.scalar_type() == x.scalar_type(),
                  "grad_y and s must have x's dtype");
  STD_TORCH_CHECK(is_beside(x, grad_y), "grad_y must be on x's device");
  STD_TORCH_CHECK(is_beside(x, s), "s must be on x's device");
}

inline void check_lora_linear_backward(const Tensor& grad_y, const Tensor& x, const Tensor& s, const Tensor& weight,
                                       const Tensor& lora_A, const Tensor& lora_B, const std::optional<Tensor>& seed) {
  check_lora_linear(x, weight, lora_A, lora_B, std::nullopt, seed);
  check_gradient(grad_y, x, s, weight.size(0), lora_A.size(0));
}

inline void check_frozen_linear_backward(const Tensor& grad_y, const Tensor& weight) {
  STD_TORCH_CHECK(grad_y.dim() > 0 && weight.dim() == 2 && grad_y.size(grad_y.dim() - 1) == weight.size(0),
                  "grad_y must be [..., n] and weight [n, k]");
  STD_TORCH_CHECK(grad_y.scalar_type() == weight.scalar_type(), "weight must have grad_y's dtype");
  STD_TORCH_CHECK(is_beside(grad_y, weight), "weight must be on grad_y's device");
}

}  // namespace lk
