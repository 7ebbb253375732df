// Weights of layout "codes4" on any device: from the parts that an op is given to what kernels take, checked.
#pragma once

#include <string>
#include <vector>

#include "../params/packed_weight.h"
#include "aten.h"

namespace lk {

inline void check_codes4_part(const Tensor& data, const Tensor& part, ScalarType dtype, int64_t count,
                              const char* message) {
  STD_TORCH_CHECK(part.scalar_type() == dtype && part.numel() == count && part.is_contiguous(), message);
  STD_TORCH_CHECK(is_beside(data, part), "the parts of weight must be on one device");
}

// [n, k] weights of layout "codes4" from (data, scales, code), or with (scales2, code2, offset) behind these.
inline Codes4Weight codes4_weight(const std::vector<Tensor>& parts, const std::string& layout, int64_t n, int64_t k,
                                  int64_t block) {
  STD_TORCH_CHECK(layout == "codes4", "layout must be codes4");
  STD_TORCH_CHECK(parts.size() == 3 || parts.size() == 6, "weight of layout codes4 has 3 parts, or 6");
  STD_TORCH_CHECK(n >= 0 && k >= 0 && block >= 2 && block % 2 == 0 && k % block == 0,
                  "block must be even, and k a multiple of it");
  const bool nested = parts.size() == 6;
  const int64_t scales = n * (k / block);
  const Tensor& data = parts[0];
  check_codes4_part(data, data, ScalarType::Byte, n * k / 2, "data must be contiguous uint8 [n * k / 2]");
  check_codes4_part(data, parts[1], nested ? ScalarType::Byte : ScalarType::Float, scales,
                    "scales must be contiguous [n * k / block], uint8 where they are quantised, else float32");
  check_codes4_part(data, parts[2], ScalarType::Float, 16, "code must be contiguous float32 [16]");
  Codes4Weight w{.data = static_cast<const uint8_t*>(data.const_data_ptr()),
                 .scales = parts[1].const_data_ptr(),
                 .code = static_cast<const float*>(parts[2].const_data_ptr()),
                 .scales2 = nullptr,
                 .code2 = nullptr,
                 .offset = nullptr,
                 .count = n * k,
                 .block = block};
  if (!nested) return w;
  check_codes4_part(data, parts[3], ScalarType::Float, (scales + kScalesPerScale2 - 1) / kScalesPerScale2,
                    "scales2 must be contiguous float32 [scales / 256, rounded up]");
  check_codes4_part(data, parts[4], ScalarType::Float, 256, "code2 must be contiguous float32 [256]");
  check_codes4_part(data, parts[5], ScalarType::Float, 1, "offset must be one float32 number");
  w.scales2 = static_cast<const float*>(parts[3].const_data_ptr());
  w.code2 = static_cast<const float*>(parts[4].const_data_ptr());
  w.offset = static_cast<const float*>(parts[5].const_data_ptr());
  return w;
}

}  // namespace lk
