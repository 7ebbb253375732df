// What the five steps of the tour have in common: the problem, and how a result is stored.
#pragma once

#include "tile.h"

namespace lk::tour {

// y = x wᵀ + bias + s bᵀ with s = scaling · x aᵀ. bf16, row by row without gaps, from 16-byte boundaries on; sums are
// in fp32. n, k and rank are multiples of 8, m is anything.
struct Problem {
  const uint16_t *x, *w, *a, *b, *bias;  // [m, k], [n, k], [rank, k], [n, rank], [n]
  uint16_t *s, *y;                       // [m, rank], [m, n]
  uint32_t* counters;                    // zero before a launch of steps 3 to 5: 1 + blocks of 128 rows
  int m, n, k, rank;
  float scaling;
};

// A matrix of bf16, row by row.
struct Operand {
  const uint16_t* data;
  int rows, depth;
};

constexpr int kM = 128, kDepth = 64;  // rows of a tile, and how much of the depth is multiplied at a time
constexpr int kRankTile = 64;         // columns of a tile of s

// A warp's accumulators from element (row0, column0) on: kRows x kColumns fragments of 16 x 8, of which a lane holds
// two neighbouring columns of a row and of the eighth row below. out = scale · acc + bias, where that is inside of out
// [rows, columns]; without a bias, null.
template <int kRows, int kColumns>
LK_DEVICE void store_fragments(uint16_t* out, int rows, int columns, int row0, int column0, const float* acc,
                               float scale, const uint16_t* bias) {
  const int lane = thread_index() % kWarp;
  LK_UNROLL
  for (int j = 0; j < kColumns; ++j) {
    const int column = column0 + j * 8 + FragmentC::column(lane);
    if (column >= columns) continue;  // which is even
    const uint32_t both = bias == nullptr ? 0 : load_global(reinterpret_cast<const uint32_t*>(bias + column));
    LK_UNROLL
    for (int i = 0; i < kRows * 2; ++i) {
      const int row = row0 + i * 8 + FragmentC::row(lane);
      if (row >= rows) continue;
      const float* const d = acc + (i / 2 * kColumns + j) * 4 + i % 2 * 2;
      const float low = scale * d[0] + BFloat16::low(both), high = scale * d[1] + BFloat16::high(both);
      store_global(reinterpret_cast<uint32_t*>(out + static_cast<int64_t>(row) * columns + column),
                   BFloat16::pack(low, high));
    }
  }
}

}  // namespace lk::tour
