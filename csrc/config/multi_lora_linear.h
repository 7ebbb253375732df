// Problem -> tiles and grids of multi_lora_linear and its gradients, from shapes alone: who has which adapter is on the
// device. Host only, no CUDA.
#pragma once

#include "grouped_lora_linear.h"

namespace lk {

// Ranks of a row that a block of the few rows' kernel computes: one each of its warps.
constexpr int kRanksOfDecodeBlock = 4;

constexpr int64_t shrink_blocks_of_decode(int64_t m, int64_t rank) { return m * blocks_of(rank, kRanksOfDecodeBlock); }

// Whether one launch does it: what reads w once, with an adapter of its own for each row. Dropout would be computed
// once for every rank.
inline bool decodes_adapters(int64_t m, bool w_is_whole, bool has_dropout) {
  return m <= kFewRows && w_is_whole && !has_dropout;
}

// counters: tickets, parts of s that are done, and one per tile.
inline LoraLinearConfig multi_lora_decode_config(int64_t m, int64_t n, int64_t k, int64_t rank, int element_bytes,
                                                 const DeviceLimits& device) {
  LoraLinearConfig config{};
  const LoraTile tile = m <= tile_shape(LoraTile::kFlat).rows ? LoraTile::kFlat : LoraTile::kSmall;
  config.key = {LoraRole::kForward, Schedule::kDecode, tile, 0, Access::kWhole};
  config.reason = "few rows: w is streamed once, and each row's own adapter beside it, in one launch";
  config.tile_reason = "one block of rows";
  plan_splits(m, n, k, element_bytes, device, config);
  config.counters = 2 + blocks_of(n, tile_shape(tile).columns);
  config.blocks += shrink_blocks_of_decode(m, rank);
  return config;
}

// Of many rows: s, or s', of blocks of rows that share an adapter...
struct MultiLoraConfig {
  int64_t row_blocks;
  LoraLinearConfig launch;
};

inline MultiLoraConfig multi_lora_shrink_config(LoraRole role, int64_t m, int64_t k, int64_t rank, int64_t adapters,
                                                int element_bytes, const DeviceLimits& device) {
  MultiLoraConfig config{};
  LoraLinearConfig& launch = config.launch;
  const int rank_tile = rank_tile_of(rank);
  const LoraTile tile = rank_tile == 16 ? LoraTile::kNarrow : LoraTile::kSmall;
  launch.key = {role, Schedule::kShrink, tile, rank_tile, Access::kWhole};
  launch.reason = "s alone, of rows that are looked up by adapter";
  launch.tile_reason = "as wide as the ranks that a block computes";
  // The depth is split as for rows of one adapter: blocks that an adapter does not fill are soon done.
  plan_splits(m, rank, k, element_bytes, device, launch);
  const TileShape shape = tile_shape(tile);
  config.row_blocks = blocks_of_groups(m, shape.rows, adapters);
  const int64_t tiles = config.row_blocks * blocks_of(rank, shape.columns);
  launch.blocks = tiles * launch.splits;
  launch.counters = launch.splits == 1 ? 0 : tiles;
  launch.partials = launch.splits == 1 ? 0 : launch.blocks * shape.rows * shape.columns;
  return config;
}

// ... and the branch of y [m, n], or of dX, added to the product with w.
inline MultiLoraConfig multi_lora_expand_config(LoraRole role, int64_t m, int64_t n, int64_t adapters) {
  MultiLoraConfig config{};
  LoraLinearConfig& launch = config.launch;
  const TileShape shape = tile_shape(LoraTile::kBranch);
  launch.key = {role, Schedule::kExpand, LoraTile::kBranch, 0, Access::kWhole};
  launch.splits = 1;
  launch.reason = "the branch of each adapter's rows is added to the vendor's product of all rows";
  launch.tile_reason = "two stages are as deep as most ranks";
  config.row_blocks = blocks_of_groups(m, shape.rows, adapters);
  launch.blocks = config.row_blocks * blocks_of(n, shape.columns);
  return config;
}

// dA [adapters, rank, k] and dB [adapters, n, rank]; k or n is 0 where the gradient is not wanted.
inline LoraGradsConfig multi_lora_grads_config(int64_t m, int64_t n, int64_t k, int64_t rank, int64_t adapters,
                                               bool ranks_are_whole, const DeviceLimits& device) {
  LoraGradsConfig config = grouped_lora_grads_config(m, n, k, rank, adapters, device);
  config.key.access = access_of(true, ranks_are_whole);
  return config;
}

}  // namespace lk
