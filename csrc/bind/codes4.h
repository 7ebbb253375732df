// Weights of layouts "codes4" and "codes4_low": from the parts that an op is given to what kernels take, checked.
#pragma once

#include <vector>

#include "packed_part.h"

namespace lk {

// [n, k] weights from (data, scales, code), or with (scales2, code2, offset) behind these.
inline PackedParts codes4_parts(const std::vector<Tensor>& parts, int64_t n, int64_t k, int64_t block) {
  STD_TORCH_CHECK(parts.size() == 3 || parts.size() == 6, "packed weight: one of layout codes4 has 3 parts, or 6");
  STD_TORCH_CHECK(block >= 2 && block % 2 == 0 && k % block == 0,
                  "packed weight: block must be even, and k a multiple of it");
  const bool nested = parts.size() == 6;
  const int64_t scales = n * (k / block);
  const Tensor& data = parts[0];
  check_packed_part(data, data, ScalarType::Byte, n * k / 2, "data must be contiguous uint8 [n * k / 2]");
  check_packed_part(data, parts[1], nested ? ScalarType::Byte : ScalarType::Float, scales,
                    "scales must be contiguous [n * k / block], uint8 where they are quantised, else float32");
  check_packed_part(data, parts[2], ScalarType::Float, 16, "code must be contiguous float32 [16]");
  PackedParts p{};
  p.scales = parts[1].const_data_ptr();
  p.code = static_cast<const float*>(parts[2].const_data_ptr());
  if (!nested) return p;
  check_packed_part(data, parts[3], ScalarType::Float, (scales + kScalesPerScale2 - 1) / kScalesPerScale2,
                    "scales2 must be contiguous float32 [scales / 256, rounded up]");
  check_packed_part(data, parts[4], ScalarType::Float, 256, "code2 must be contiguous float32 [256]");
  check_packed_part(data, parts[5], ScalarType::Float, 1, "offset must be one float32 number");
  p.scales2 = static_cast<const float*>(parts[3].const_data_ptr());
  p.code2 = static_cast<const float*>(parts[4].const_data_ptr());
  p.offset = static_cast<const float*>(parts[5].const_data_ptr());
  return p;
}

}  // namespace lk
