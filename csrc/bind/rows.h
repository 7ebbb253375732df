// Rows of floating-point tensors as the kernels take them.
#pragma once

#include "../config/tiles.h"
#include "../params/common.h"
#include "aten.h"

namespace lk {

inline FloatType float_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return FloatType::kFloat32;
    case ScalarType::BFloat16:
      return FloatType::kBFloat16;
    case ScalarType::Half:
      return FloatType::kFloat16;
    case ScalarType::Double:
      return FloatType::kFloat64;
    default:
      STD_TORCH_CHECK(false, "not a floating-point type of the kernels");
  }
}

inline FloatType float_type(const Tensor& t) { return float_type(t.scalar_type()); }

// Any strides but the last one's.
inline Tensor with_contiguous_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.stride(last) == 1 || t.size(last) <= 1 ? t : torch::stable::contiguous(t);
}

// Whether these rows, and those of contiguous tensors that are as wide, begin at 16 bytes. Strides of dimensions that
// have one element say nothing.
inline bool rows_aligned(const Tensor& t) {
  const auto size = static_cast<int64_t>(t.element_size());
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kChunkBytes != 0) return false;
  if (t.size(t.dim() - 1) * size % kChunkBytes != 0) return false;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) {
    if (t.size(d) > 1 && t.stride(d) * size % kChunkBytes != 0) return false;
  }
  return true;
}

// The CUDA kernels that convert rows serve an `other` type that is the same, or float32.
inline bool gpu_converts(FloatType type, FloatType other) {
  return type != FloatType::kFloat64 && (other == type || other == FloatType::kFloat32);
}

}  // namespace lk
