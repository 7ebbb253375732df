// The parameters of lora_linear's kernels for sm_90a.
#pragma once

#include "lora_linear.h"
#include "tensor_map.h"

namespace lk {

// A matrix of fp32 whose rows, `stride` elements apart, are rounded to 16-bit elements, rows without gaps. Null: none.
struct RoundedMatrix {
  const float* from;
  void* to;
  int64_t stride;
  int32_t rows, columns;  // whole chunks
};

// What LoraLinearParams says, and its matrices as the copy engine takes them (launch/lora_wgmma_boxes.h). Elements are
// of 16 bits, the adapter's, too: where these are fp32 in memory, `a` and `b` are workspace that the launch fills.
//
// Counters are zero before the launch, but not after it: tickets of tiles, tickets of slabs of s (forward), then a flag
// per block of rows; where adapters are rounded, tickets of that, and how many are done.
struct LoraWgmmaParams {
  LoraLinearParams lora;
  RoundedMatrix rounded_a, rounded_b;
  TensorMap x, w, b, s, y;
  TensorMap a, saved_s;  // of the gradient of x
};

}  // namespace lk
