// The dropout mask as a tensor: one thread per Philox group of eight elements.
#pragma once

#include "../device.h"
#include "../params/dropout_mask.h"

namespace lk {

constexpr int kDropoutMaskThreads = 256;

// The blocks of a launch: one thread per group, as far as a grid goes; the kernel strides over the rest.
inline int64_t dropout_mask_blocks(const DropoutMaskParams& p, int64_t most) {
  const int64_t groups = p.rows * dropout_groups_per_row(p.columns);
  const int64_t blocks = (groups + kDropoutMaskThreads - 1) / kDropoutMaskThreads;
  return blocks < most ? blocks : most;
}

LK_KERNEL(kDropoutMaskThreads, 1) dropout_mask_kernel(const DropoutMaskParams p) {
  const int64_t groups_per_row = dropout_groups_per_row(p.columns), groups = p.rows * groups_per_row;
  const int64_t step = static_cast<int64_t>(block_count()) * kDropoutMaskThreads;
  const uint64_t seed = static_cast<uint64_t>(load_global(p.seed));
  for (int64_t group = static_cast<int64_t>(block_index()) * kDropoutMaskThreads + thread_index(); group < groups;
       group += step) {
    const PhiloxWords words = philox4x32(static_cast<uint64_t>(group), seed);
    const int64_t row = group / groups_per_row, column = group % groups_per_row * kDropoutGroup;
    bool* keep_gmem = p.keep + row * p.columns + column;
    if (p.columns % kDropoutGroup == 0) {
      uint64_t keep_reg = 0;  // eight bools, one 8-byte store
      for (int j = 0; j < kDropoutGroup; ++j) {
        keep_reg |= static_cast<uint64_t>(dropout_bits(words, j) >= p.threshold) << (8 * j);
      }
      store_global(reinterpret_cast<uint64_t*>(keep_gmem), keep_reg);
    } else {
      for (int j = 0; j < kDropoutGroup; ++j) {
        if (column + j < p.columns) store_global(keep_gmem + j, dropout_bits(words, j) >= p.threshold);
      }
    }
  }
}

}  // namespace lk
