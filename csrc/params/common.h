// What the parameter structs of several ops have. A Params is plain, one per kernel. No torch, no CUDA: strides are in
// elements, rows are contiguous.
#pragma once

#include <cstdint>

namespace lk {

// Element types of tensors.
enum class FloatType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

}  // namespace lk
