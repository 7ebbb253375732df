// The parameters of lora_linear's kernels for sm_90a.
#pragma once

#include "lora_linear.h"
#include "tensor_map.h"

namespace lk {

// What LoraLinearParams says, and its matrices as the copy engine takes them (launch/lora_wgmma_boxes.h). Elements are
// of 16 bits, the adapter's, too. Counters are zero before the launch, but not after it: tickets of tiles, tickets of
// slabs of s, then a flag per block of rows; of the gradient of x, whose s is there before, the first alone.
struct LoraWgmmaParams {
  LoraLinearParams lora;
  TensorMap x, w, b, s, y;
};

}  // namespace lk
