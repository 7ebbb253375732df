// gated_activation's parameters, and its gradient's.
#pragma once

#include "common.h"

namespace lk {

enum class Activation : int32_t { kSilu, kGelu, kGeluTanh, kRelu };

// h = activation(gate) * up, of `count` elements of one type.
struct GatedActivationParams {
  FloatType type;
  Activation activation;
  const void *gate, *up;
  void *h;
  int64_t count;
};

// grad_gate = grad_h * up * activation'(gate), grad_up = grad_h * activation(gate). The results may lie where gate and
// up, or grad_h, do.
struct GatedActivationBackwardParams {
  FloatType type;
  Activation activation;
  const void *grad_h, *gate, *up;
  void *grad_gate, *grad_up;
  int64_t count;
};

}  // namespace lk
