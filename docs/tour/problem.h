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

// A fragment of 16 x 8 as an accumulator holds it: two neighbouring columns of row `row` and of the eighth row below.
// out = scale · d + bias, where that is inside of out [rows, columns]; without a bias, null.
LK_DEVICE void store_fragment(uint16_t* out, int rows, int columns, int row, int column, const float* d, float scale,
                              const uint16_t* bias) {
  if (column >= columns) return;  // which is even
  float of_bias[2] = {};
  LK_UNROLL
  for (int i = 0; i < 2; ++i) {
    if (bias != nullptr) of_bias[i] = BFloat16::low(load_global(bias + column + i));
  }
  LK_UNROLL
  for (int half = 0; half < 2; ++half) {
    if (row + half * 8 >= rows) continue;
    store_global(reinterpret_cast<uint32_t*>(out + static_cast<int64_t>(row + half * 8) * columns + column),
                 BFloat16::pack(scale * d[half * 2] + of_bias[0], scale * d[half * 2 + 1] + of_bias[1]));
  }
}

// A warp's accumulators, kRows x kColumns fragments from element (row0, column0) on.
template <int kRows, int kColumns>
LK_DEVICE void store_fragments(uint16_t* out, int rows, int columns, int row0, int column0, const float* acc,
                               float scale, const uint16_t* bias) {
  const int row = row0 + FragmentC::row(thread_index() % kWarp),
            lane_column = FragmentC::column(thread_index() % kWarp);
  LK_UNROLL
  for (int i = 0; i < kRows; ++i) {
    LK_UNROLL
    for (int j = 0; j < kColumns; ++j) {
      const float* const d = acc + (i * kColumns + j) * 4;
      store_fragment(out, rows, columns, row + i * 16, column0 + j * 8 + lane_column, d, scale, bias);
    }
  }
}

}  // namespace lk::tour
