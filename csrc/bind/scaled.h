// Weights of layouts "int8" and "e4m3": from the parts that an op is given to what kernels take, checked.
#pragma once

#include <vector>

#include "packed_part.h"

namespace lk {

// [n, k] weights from (data, scales).
inline PackedParts scaled_parts(const std::vector<Tensor>& parts, int64_t n, int64_t k, int64_t block) {
  STD_TORCH_CHECK(parts.size() == 2, "packed weight: one of layout int8 or e4m3 has 2 parts");
  STD_TORCH_CHECK(block >= 1, "packed weight: block must be at least 1");
  const Tensor &data = parts[0], &scales = parts[1];
  check_packed_part(data, data, ScalarType::Byte, n * k, "data must be contiguous uint8 [n, k]");
  const int64_t rows = scales.dim() == 2 ? scales.size(0) : -1;
  const int64_t columns = k / block + (k % block != 0), rows_of_squares = n / block + (n % block != 0);
  STD_TORCH_CHECK(
      rows == n || rows == rows_of_squares || rows == 1,
      "packed weight: scales must have a row for each row of the weight, for each block of rows, or for all");
  check_packed_part(data, scales, ScalarType::Float, rows * columns,
                    "scales must be contiguous float32, with a column for each block of columns");
  PackedParts p{};
  p.scales = scales.const_data_ptr();
  p.block_rows = static_cast<int32_t>(rows == n ? 1 : rows == 1 ? n : block);
  p.block_columns = static_cast<int32_t>(columns);
  return p;
}

}  // namespace lk
