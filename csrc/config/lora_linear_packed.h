// When, and in which grid, few rows are multiplied by a packed weight in one launch: what launch, kernel, plan and
// tests agree on. No CUDA.
#pragma once

#include <algorithm>

#include "tiles.h"

namespace lk {

constexpr int kPackedThreads = 256;
constexpr int kPackedRanks = 16;  // that a block of s has

// Rows of the weight that a block has, which share what it reads of x. From 17 rows of x on that is more than the
// weight has itself, four times for 32 rows by 16; by 32, half of it. More are no longer in registers.
constexpr int packed_tile(int row_tile) { return row_tile <= 16 ? 16 : 32; }

// Weights of a row that are multiplied before a scale is: four products of 16.
constexpr int kPackedStep = 64;

constexpr int64_t kMaxPackedRows = 64;  // of x: two row tiles, each of which decodes the weight again
constexpr int64_t kMaxPackedRank = 64;  // beyond it, what every block adds of the branch is not little

struct LoraLinearPackedConfig {
  int row_tile;      // of x: 8, 16 or 32
  int parts;         // of the depth, for s
  int64_t blocks;    // of threads: a tile and a part of s each, and a tile of the weight
  int64_t counters;  // 32-bit words of workspace, zero before the launch
  int64_t partials;  // floats of workspace
};

// aligned: rows of x and of the adapter's a, and the packed weights, begin at 16 bytes. A block of weights is some
// steps, and, so that a shift finds it, a power of two.
constexpr bool serves_packed(int64_t m, int64_t k, int64_t block, int64_t rank, bool aligned, bool has_dropout) {
  return m >= 1 && m <= kMaxPackedRows && k > 0 && block >= kPackedStep && (block & (block - 1)) == 0 &&
         rank <= kMaxPackedRank && aligned && !has_dropout;
}

// Up to so many rows this is taken for faster than to decode the weight into memory and multiply by it there. A model,
// not measured: for 4096 x 4096 weights and 64 rows, this moves 85 MB through the L2 cache, and decodes twice, at about
// five operations of integers for a weight; two launches write and read 33 MB each. That is more time on every
// architecture but sm_100, whose memory is so fast that the two are about even, and one row tile is ahead.
constexpr int64_t most_decoded_rows(int capability) { return capability / 10 == 10 ? 32 : kMaxPackedRows; }

constexpr LoraLinearPackedConfig lora_linear_packed_config(int64_t m, int64_t n, int64_t k, int64_t rank) {
  const int row_tile = m <= 8 ? 8 : m <= 16 ? 16 : 32;
  const int64_t row_tiles = blocks_of(m, row_tile), tiles_of_s = blocks_of(rank, kPackedRanks) * row_tiles;
  // A block of s reads 16 rows of a as another one does of the weight, whose elements have a quarter of their bits.
  const int64_t parts = std::clamp<int64_t>(k / 1024, 1, 8);
  return {.row_tile = row_tile,
          .parts = static_cast<int>(parts),
          .blocks = tiles_of_s * parts + blocks_of(n, packed_tile(row_tile)) * row_tiles,
          .counters = 2 + tiles_of_s,
          .partials = tiles_of_s * parts * kPackedRanks * row_tile};
}

}  // namespace lk
