// Packed weights on any device: from what describes them to an op to what kernels take, checked. Every layout is
// chosen here.
#pragma once

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "codes4.h"
#include "scaled.h"

namespace lk {

inline PackedParts packed_parts(const std::vector<Tensor>& parts, const std::string& layout, int64_t n, int64_t k,
                                int64_t block) {
  constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();  // n * k is a number, too
  STD_TORCH_CHECK(n >= 0 && k >= 0 && n <= kLargest && k <= kLargest, "n and k must be sizes of 32 bits");
  PackedParts p;
  if (layout == "codes4") {
    p = codes4_parts(parts, n, k, block);
    p.layout = PackedLayout::kCodes4;
  } else {
    STD_TORCH_CHECK(layout == "int8" || layout == "e4m3", "layout must be codes4, int8 or e4m3");
    p = scaled_parts(parts, n, k, block);
    p.layout = layout == "int8" ? PackedLayout::kInt8 : PackedLayout::kE4M3;
  }
  p.data = static_cast<const uint8_t*>(parts[0].const_data_ptr());
  p.n = static_cast<int32_t>(n);
  p.k = static_cast<int32_t>(k);
  p.block = static_cast<int32_t>(std::min(block, std::max<int64_t>(k, 1)));
  return p;
}

}  // namespace lk
