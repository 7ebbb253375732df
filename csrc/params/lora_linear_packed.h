// lora_linear_packed's parameters.
#pragma once

#include "common.h"
#include "packed_weight.h"

namespace lk {

// y = x wᵀ + bias + scaling · s bᵀ, s = x aᵀ, for few rows of x. Its type is the products', y's, s's and the bias's;
// the adapter has it too, or is fp32. Rows begin at 16 bytes.
struct LoraLinearPackedParams {
  Codes4Weight weight;  // [n, k]
  const void* x;        // [m, k]
  int64_t x_stride;
  const void* a;  // [rank, k]
  int64_t a_stride;
  const void* b;  // [n, rank]
  int64_t b_stride;
  const void* bias;  // [n], or null
  void* y;           // [m, n], contiguous
  void* s;           // [m, rank], contiguous
  // A ticket, the tiles of s that are done, and for each of these the parts that are; zero before.
  uint32_t* counters;
  float* partials;
  int32_t m, n, k, rank;
  int32_t parts;  // of the depth, for s
  float scaling;
  FloatType adapter_type;
};

}  // namespace lk
