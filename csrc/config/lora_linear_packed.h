// When, and in which grid, few rows are multiplied by a packed weight in one launch: what launch, kernel, plan and
// tests agree on. No CUDA.
#pragma once

#include <algorithm>

#include "tiles.h"

namespace lk {

constexpr int kPackedThreads = 256;
constexpr int kPackedTile = 16;  // rows of the weight, and ranks, that a block has

// Weights of a row that are multiplied before a scale is: four products of 16.
constexpr int kPackedStep = 64;

constexpr int64_t kMaxPackedRows = 16;  // of x
constexpr int64_t kMaxPackedRank = 64;  // beyond it, what every block adds of the branch is not little

struct LoraLinearPackedConfig {
  int row_tile;      // of x: 8 or 16
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

constexpr LoraLinearPackedConfig lora_linear_packed_config(int64_t m, int64_t n, int64_t k, int64_t rank) {
  const int row_tile = m <= 8 ? 8 : 16;
  const int64_t tiles_of_s = blocks_of(rank, kPackedTile);
  // A block of s reads 16 rows of a as another one does of the weight, whose elements have a quarter of their bits.
  const int64_t parts = std::clamp<int64_t>(k / 1024, 1, 8);
  return {.row_tile = row_tile,
          .parts = static_cast<int>(parts),
          .blocks = tiles_of_s * parts + blocks_of(n, kPackedTile),
          .counters = 2 + tiles_of_s,
          .partials = tiles_of_s * parts * kPackedTile * row_tile};
}

}  // namespace lk
