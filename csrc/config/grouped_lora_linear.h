// Problem -> tile and grid of grouped_lora_linear and its gradients, from shapes alone: where groups end is on the
// device. Host only, but for how blocks of rows are counted.
#pragma once

#include "lora_linear.h"

namespace lk {

// How many numbers blocks of `rows` rows have, of groups with m rows and of what is behind them (row_groups.cuh): of
// all these, no more than m have any...
constexpr int64_t blocks_of_groups(int64_t m, int64_t rows, int64_t groups) {
  return blocks_of(m, rows) + std::min(groups, m - 1);
}

// ... and of groups that have one where they have no rows.
constexpr int64_t parts_of_groups(int64_t m, int64_t rows, int64_t groups) { return m / rows + groups; }

// Slots for sums of parts of `rows` rows, in front of a group's that begins in this row. A group of more than `rows`
// rows has at most twice as many parts as whole ones.
constexpr int64_t slots_of_parts(int64_t first_row, int64_t rows) { return 2 * first_row / rows; }

struct GroupedLoraKey {
  LoraRole role;
  LoraTile tile;
  int rank_tile;
  bool w_in_rows;  // of the weight's, [N, K]; else they are its columns, as [K, N] in memory has them
  bool onto_y;     // the vendor has made the product with w, and the branch is added (w_in_rows is true)

  friend constexpr bool operator==(const GroupedLoraKey&, const GroupedLoraKey&) = default;
};

// The tile for y [m, n] of groups that are taken to be equal.
inline LoraTile choose_grouped_tile(int64_t m, int64_t n, int64_t groups, const DeviceLimits& device,
                                    const char*& reason) {
  const int64_t rows = blocks_of(m, groups);
  if (rows <= tile_shape(LoraTile::kSmall).rows) {
    reason = "few rows a group: half of a large tile would be idle";
    return LoraTile::kSmall;
  }
  return choose_tile(rows, n * groups, device, reason);
}

// Whether the product with the weights is the vendor's, for y [m, n] or dX. Its grouped GEMM multiplies each group's
// rows by a weight of their own, in bf16 on sm_90 and sm_100 (elsewhere torch loops over the groups, whose sizes the
// host then waits for); one weight of all is a plain product. Our tiles then read y and add the branch: a pass over y
// more than the plain kernel's, whose vendor accumulates onto the branch, but the same reason (prefers_cublas).
struct GroupedProduct {
  bool is_shared;   // one weight of all groups
  bool has_vendor;  // of weights of their own, of this type in this torch
};
inline UsesCublas grouped_uses_vendor(int64_t m, int64_t n, int64_t groups, const GroupedProduct& product,
                                      const DeviceLimits& device, Wanted wanted) {
  const int family = device.capability / 10;
  if (!product.is_shared && !(product.has_vendor && (family == 9 || family == 10))) {
    return {false, "the vendor's grouped GEMM serves bf16 on sm_90 and sm_100"};
  }
  if (is_decided(wanted)) return {wanted == Wanted::kCublas, "as asked"};
  if (blocks_of(m, groups) <= kFewRows) {
    if (product.is_shared && groups > 1) {
      return {true, "one weight, and few rows of each group: every group's tiles would read it again"};
    }
    return {false, "few rows of each group: reading its weight is what counts, and the vendor is a launch more"};
  }
  const char* tile_reason;
  return prefers_cublas(device.capability, choose_grouped_tile(m, n, groups, device, tile_reason) == LoraTile::kLarge);
}

// A launch of y [m, n] and s in tickets, or of dX and s'.
struct GroupedLoraConfig {
  GroupedLoraKey key;
  int64_t row_blocks;
  LoraLinearConfig launch;
};

inline GroupedLoraConfig grouped_lora_config(LoraRole role, int64_t m, int64_t n, int64_t rank, int64_t groups,
                                             bool w_in_rows, bool onto_y, const DeviceLimits& device) {
  GroupedLoraConfig config{};
  LoraLinearConfig& launch = config.launch;
  launch.key = {role, Schedule::kTicketed, LoraTile::kSmall, rank_tile_of(rank), Access::kWhole};
  launch.splits = 1;
  launch.reason = onto_y ? "tiles know their group, and add its branch to the vendor's product"
                         : "tiles know their group: one launch for all";
  launch.key.tile = choose_grouped_tile(m, n, groups, device, launch.tile_reason);
  config.row_blocks = blocks_of_groups(m, tile_shape(launch.key.tile).rows, groups);
  plan_tickets_of(config.row_blocks, n, rank, launch);
  config.key = {role, launch.key.tile, launch.key.rank_tile, w_in_rows || onto_y, onto_y};
  return config;
}

// dA [groups, rank, k] and dB [groups, n, rank]; k or n is 0 where the gradient is not wanted.
inline LoraGradsConfig grouped_lora_grads_config(int64_t m, int64_t n, int64_t k, int64_t rank, int64_t groups,
                                                 const DeviceLimits& device) {
  constexpr int kColumns = 128, kDepth = 32, kBlocksPerSm = 2, kMinRows = 256;
  LoraGradsConfig config{};
  config.key = grads_key(wide_rank_tile_of(rank), true, true, true);
  const int64_t tiles = (blocks_of(k, kColumns) + blocks_of(n, kColumns)) * blocks_of(rank, config.key.rank_tile);
  // So many rows that a group of everything fills the GPU. Where equal groups do, none of them is split.
  const int64_t rows = std::max<int64_t>(kMinRows, blocks_of(m * tiles, int64_t{kBlocksPerSm} * device.sms));
  config.split_rows = static_cast<int>(blocks_of(rows, kDepth) * kDepth);
  config.splits = 1;
  config.blocks = tiles * parts_of_groups(m, config.split_rows, groups);
  config.counters = tiles * slots_of_parts(m, config.split_rows);
  config.partials = config.counters * kColumns * config.key.rank_tile;
  return config;
}

}  // namespace lk
