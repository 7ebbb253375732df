// What an emulated launch may read of a packed weight.
#pragma once

#include "../config/dequantize.h"
#include "launches.h"

namespace lk {

// first_row: the first that memory is there for.
inline void add_parts(Memory& memory, const PackedParts& w, int64_t first_row) {
  const int64_t rows = w.n - first_row, first = first_row * w.k, count = rows * w.k;
  const int byte_weights = 8 / packed_bits(w.layout);
  memory.input(w.data + first / byte_weights, 1, 1, count / byte_weights, 0);
  if (is_codes4(w.layout)) {
    const size_t scale = w.scales2 == nullptr ? sizeof(float) : 1;
    const int64_t scales = count / w.block;
    memory.input(static_cast<const char*>(w.scales) + first / w.block * scale, scale, 1, scales, 0);
    memory.input(w.code, sizeof(float), 1, 16, 0);
    memory.input(w.scales2, sizeof(float), 1, blocks_of(scales, kScalesPerScale2), 0);
    memory.input(w.code2, sizeof(float), 1, 256, 0);
    memory.input(w.offset, sizeof(float), 1, 1, 0);
  } else {
    const int64_t row = first_row / w.block_rows;
    const float* const scales = static_cast<const float*>(w.scales) + row * w.block_columns;
    memory.input(scales, sizeof(float), blocks_of(w.n, w.block_rows) - row, w.block_columns, w.block_columns);
  }
}

}  // namespace lk
