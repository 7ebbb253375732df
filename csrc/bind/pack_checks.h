// What the kernels of lora_pack take for granted about their operands: each member's are those of a lora_linear, but
// that a rank may be 0 and a bias may have no elements, where there is none.
#pragma once

#include "lora_checks.h"

namespace lk {

using Tensors = std::vector<Tensor>;

inline int64_t total_rank(const Tensors& lora_As) {
  int64_t rank = 0;
  for (const Tensor& a : lora_As) rank += a.size(0);
  return rank;
}

inline void check_member(const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B) {
  check_frozen_linear(x, weight, std::nullopt);
  if (lora_A.dim() == 2 && lora_A.size(0) == 0) {
    STD_TORCH_CHECK(lora_A.size(1) == weight.size(1), "lora_A must be [0, k]");
    STD_TORCH_CHECK(lora_B.dim() == 2 && lora_B.size(0) == weight.size(0) && lora_B.size(1) == 0,
                    "lora_B must be [n, 0]");
    return;
  }
  check_adapter(x, weight.size(0), weight.size(1), lora_A, lora_B, std::nullopt);
}

inline void check_lora_pack(const Tensor& x, const Tensors& weights, const Tensors& lora_As, const Tensors& lora_Bs,
                            const Tensors& biases, const std::optional<Tensor>& seed,
                            const std::vector<double>& scalings, const std::vector<double>& dropout_p) {
  const size_t members = weights.size();
  STD_TORCH_CHECK(members >= 1 && lora_As.size() == members && lora_Bs.size() == members &&
                      scalings.size() == members && dropout_p.size() == members,
                  "weights, lora_As, lora_Bs, scalings and dropout_p must be of as many members, at least one");
  STD_TORCH_CHECK(biases.empty() || biases.size() == members, "biases must be of no member or of each");
  for (size_t i = 0; i < members; ++i) check_member(x, weights[i], lora_As[i], lora_Bs[i]);
  for (size_t i = 0; i < biases.size(); ++i) {
    if (biases[i].numel() != 0) check_bias(x, weights[i].size(0), biases[i]);
  }
  if (seed) check_seed(*seed);
  STD_TORCH_CHECK(is_beside(x, seed), "seed must be on x's device");
}

inline void check_lora_pack_backward(const Tensors& grad_ys, const Tensor& x, const Tensor& s, const Tensors& weights,
                                     const Tensors& lora_As, const Tensors& lora_Bs, const std::optional<Tensor>& seed,
                                     const std::vector<double>& scalings, const std::vector<double>& dropout_p,
                                     const std::vector<bool>& need_A, const std::vector<bool>& need_B) {
  check_lora_pack(x, weights, lora_As, lora_Bs, {}, seed, scalings, dropout_p);
  const size_t members = weights.size();
  STD_TORCH_CHECK(grad_ys.size() == members && need_A.size() == members && need_B.size() == members,
                  "grad_ys, need_A and need_B must be of as many members as weights");
  STD_TORCH_CHECK(s.dim() == 1 && s.size(0) == rows_of(x) * total_rank(lora_As) && s.stride(0) == 1,
                  "s must be [rows of x times all ranks], contiguous");
  STD_TORCH_CHECK(s.scalar_type() == x.scalar_type() && is_beside(x, s), "s must have x's dtype, and be on its device");
  for (size_t i = 0; i < members; ++i) {
    STD_TORCH_CHECK(has_rows_of(x, grad_ys[i], weights[i].size(0)),
                    "grad_y must be [..., n], with x's leading sizes, of each member");
    STD_TORCH_CHECK(grad_ys[i].scalar_type() == x.scalar_type(), "grad_y must have x's dtype");
    STD_TORCH_CHECK(is_beside(x, grad_ys[i]), "grad_y must be on x's device");
  }
}

}  // namespace lk
