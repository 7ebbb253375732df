// Calls of gated_activation and its gradients, as Params. Their results are tensors that the caller has made.
#pragma once

#include <string>

#include "../params/gated_activation.h"
#include "rows.h"

namespace lk {

inline Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  STD_TORCH_CHECK(name == "relu", "gated_activation: activation must be silu, gelu, gelu_tanh or relu, got ", name);
  return Activation::kRelu;
}

// Elements lie in one piece, in the same order.
inline void check_beside(const Tensor& like, const Tensor& t, const char* name) {
  STD_TORCH_CHECK(
      t.scalar_type() == like.scalar_type() && t.numel() == like.numel() && t.is_contiguous() && is_beside(like, t),
      "gated_activation: ", name, " must be contiguous and as large as gate, of its dtype and device");
}

inline GatedActivationParams gated_params(const Tensor& gate, const Tensor& up, const std::string& activation,
                                          const Tensor& h) {
  check_beside(gate, gate, "gate");
  check_beside(gate, up, "up");
  check_beside(gate, h, "h");
  return {.type = float_type(gate),
          .activation = activation_of(activation),
          .gate = gate.const_data_ptr(),
          .up = up.const_data_ptr(),
          .h = h.mutable_data_ptr(),
          .count = gate.numel()};
}

inline GatedActivationBackwardParams gated_params(const Tensor& grad_h, const Tensor& gate, const Tensor& up,
                                                  const std::string& activation, const Tensor& grad_gate,
                                                  const Tensor& grad_up) {
  check_beside(gate, gate, "gate");
  check_beside(gate, grad_h, "grad_h");
  check_beside(gate, up, "up");
  check_beside(gate, grad_gate, "grad_gate");
  check_beside(gate, grad_up, "grad_up");
  return {.type = float_type(gate),
          .activation = activation_of(activation),
          .grad_h = grad_h.const_data_ptr(),
          .gate = gate.const_data_ptr(),
          .up = up.const_data_ptr(),
          .grad_gate = grad_gate.mutable_data_ptr(),
          .grad_up = grad_up.mutable_data_ptr(),
          .count = gate.numel()};
}

}  // namespace lk
