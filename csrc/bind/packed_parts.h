// Packed weights on any device: from what describes them to an op to what kernels take, checked. Every layout is
// told apart here.
#pragma once

#include <algorithm>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

#include "codes4.h"
#include "scaled.h"

namespace lk {

inline PackedParts packed_parts(const std::vector<Tensor>& parts, const std::string& layout, int64_t n, int64_t k,
                                int64_t block) {
  constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();  // n * k is a number, too
  STD_TORCH_CHECK(n >= 0 && k >= 0 && n <= kLargest && k <= kLargest,
                  "packed weight: n and k must be sizes of 32 bits");
  STD_TORCH_CHECK(block <= kLargest, "packed weight: block must be a size of 32 bits");
  const auto named = std::ranges::find_if(kPackedLayouts, [&](const auto& known) { return layout == known.name; });
  STD_TORCH_CHECK(named != std::end(kPackedLayouts), "packed weight: layout is not known: ", layout);
  PackedParts p = is_codes4(named->layout) ? codes4_parts(parts, n, k, block) : scaled_parts(parts, n, k, block);
  p.layout = named->layout;
  p.data = static_cast<const uint8_t*>(parts[0].const_data_ptr());
  p.n = static_cast<int32_t>(n);
  p.k = static_cast<int32_t>(k);
  p.block = static_cast<int32_t>(std::min(block, std::max<int64_t>(k, 1)));
  return p;
}

}  // namespace lk
