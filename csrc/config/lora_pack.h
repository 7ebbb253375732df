// Problem -> tile and grid of lora_pack and its gradients. Host only, no CUDA.
#pragma once

#include "../params/lora_pack.h"
#include "lora_linear.h"

namespace lk {

struct LoraPackKey {
  LoraRole role;
  LoraTile tile;
  int rank_tile;

  friend constexpr bool operator==(const LoraPackKey&, const LoraPackKey&) = default;
};

// Columns of members' y, and their ranks, of which one may be 0.
struct PackSizes {
  int count;
  int64_t n[kMaxMembers], rank[kMaxMembers];

  int64_t total_n() const { return sum(n); }
  int64_t max_rank() const { return *std::max_element(rank, rank + count); }

  template <class F>
  int64_t sum_of(const F& f) const {
    int64_t total = 0;
    for (int i = 0; i < count; ++i) total += f(i);
    return total;
  }
  int64_t sum(const int64_t* of) const {
    return sum_of([&](int i) { return of[i]; });
  }
};

// Whether members are better off one by one, for y [m, all n] or dX [m, k].
inline UsesCublas one_by_one(int64_t m, int64_t columns, bool is_served, const DeviceLimits& device, Wanted wanted) {
  if (!is_served) return {true, "rows of a tensor are not whole chunks of 16 bytes: a launch for each member"};
  if (is_decided(wanted)) return {wanted == Wanted::kCublas, "as asked"};
  if (m <= kFewRows) return {true, "few rows: each member's launch shares out its depth"};
  const char* tile_reason;
  const LoraTile tile = choose_tile(m, columns, device, tile_reason);
  const TileShape shape = tile_shape(tile);
  if (blocks_of(m, shape.rows) * blocks_of(columns, shape.columns) < device.sms) {
    return {true, "fewer tiles than SMs: the vendor's GEMM, which each member's launch can be, splits the depth"};
  }
  return prefers_cublas(device.capability, tile == LoraTile::kLarge);
}

// A launch of every member's y [m, n] and s in tickets, or of dX [m, columns] and every s'.
struct LoraPackConfig {
  LoraPackKey key;
  int shrink_columns, base_columns;
  LoraLinearConfig launch;
};

inline LoraPackConfig lora_pack_config(LoraRole role, int64_t m, const PackSizes& sizes, int64_t columns,
                                       const DeviceLimits& device) {
  const bool sums = role == LoraRole::kGradX;
  LoraPackConfig config{};
  LoraLinearConfig& launch = config.launch;
  launch.key = {role, Schedule::kTicketed, LoraTile::kSmall, rank_tile_of(sizes.max_rank()), Access::kWhole};
  launch.splits = 1;
  launch.reason = sums ? "one launch: a tile of dX sums the products of all members"
                       : "one launch: tile columns enumerate members, whose s run beside every y";
  launch.key.tile = choose_tile(m, columns, device, launch.tile_reason);
  const TileShape tile = tile_shape(launch.key.tile);
  const auto tiles_of = [&](int64_t n) { return blocks_of(n, tile.columns); };
  config.key = {role, launch.key.tile, launch.key.rank_tile};
  config.shrink_columns =
      static_cast<int>(sizes.sum_of([&](int i) { return blocks_of(sizes.rank[i], launch.key.rank_tile); }));
  config.base_columns =
      static_cast<int>(sums ? tiles_of(columns) : sizes.sum_of([&](int i) { return tiles_of(sizes.n[i]); }));
  const int64_t rows = blocks_of(m, tile.rows);
  launch.blocks = rows * (config.shrink_columns + config.base_columns);
  launch.group_rows = static_cast<int>(std::clamp<int64_t>(rows, 1, kGroupRows / tile.rows));
  launch.counters = 2 + rows * sizes.count;
  return config;
}

}  // namespace lk
