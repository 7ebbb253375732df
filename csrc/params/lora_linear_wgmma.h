// The parameters of lora_linear's kernels for sm_90a.
#pragma once

#include "lora_linear.h"
#include "tensor_map.h"

namespace lk {

// What LoraLinearParams says, and its matrices as the copy engine takes them, in the boxes of
// config/lora_linear_wgmma.h.
struct LoraWgmmaParams {
  LoraLinearParams lora;
  TensorMap x, w, b, s, y;
};

}  // namespace lk
