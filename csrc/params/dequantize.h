// dequantize's parameters.
#pragma once

#include "common.h"
#include "packed_weight.h"

namespace lk {

// out[i] = weight i, rounded once, to `type`.
struct DequantizeParams {
  Codes4Weight weight;
  FloatType type;
  void* out;  // [count], contiguous
};

}  // namespace lk
