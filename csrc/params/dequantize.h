// dequantize's parameters.
#pragma once

#include "common.h"
#include "packed_weight.h"

namespace lk {

// out[i] = weight i, rounded once, to `type`.
struct DequantizeParams {
  PackedParts weight;
  FloatType type;
  void* out;  // [n, k], contiguous
};

}  // namespace lk
