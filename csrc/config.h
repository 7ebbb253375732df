// Problem -> tile, schedule, grid: what every launch, the emulator and the tests agree on. Host only, no CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

namespace lk {

// The device as far as a choice depends on it.
struct DeviceLimits {
  int sms;
  int shared_per_block;  // what a block may opt in to, bytes
};

constexpr int kChunkBytes = 16;    // what one cp.async, one ldmatrix row and one wide store move
constexpr int kChunkElements = 8;  // of 16 bits each

enum class LoraTile : int32_t {
  kLarge,  // 128 x 128
  kSmall,  // 64 x 64, for problems that leave SMs idle with the large one, and for rows that are not aligned
};

struct TileShape {
  int rows, columns, depth, stages;
  constexpr int shared_bytes() const { return stages * (rows + columns) * depth * 2; }
};

constexpr TileShape tile_shape(LoraTile tile) {
  return tile == LoraTile::kLarge ? TileShape{128, 128, 32, 4} : TileShape{64, 64, 64, 3};
}

struct LoraLinearConfig {
  LoraTile tile;
  bool aligned;      // rows begin at 16 bytes, and n, k and rank are multiples of 8
  int rank_tile;     // columns of s in one shrink tile
  int64_t blocks;    // one per tile of s and of y
  int group_rows;    // blocks of rows whose tickets follow each other
  int64_t counters;  // 32-bit words of workspace, zero before the launch
  const char* reason;
};

// Rows of x that a group may span: its tiles share them through the L2 cache.
constexpr int kGroupRows = 1024;

constexpr int64_t blocks_of(int64_t size, int tile) { return (size + tile - 1) / tile; }

// Whether rows of these lengths are whole chunks, which `aligned` needs besides pointers and strides.
constexpr bool whole_chunks(int64_t n, int64_t k, int64_t rank) {
  return n % kChunkElements == 0 && k % kChunkElements == 0 && rank % kChunkElements == 0;
}

// How a forward of y [m, n] with this rank is launched.
inline LoraLinearConfig lora_linear_config(int64_t m, int64_t n, int64_t rank, bool aligned,
                                           const DeviceLimits& device) {
  constexpr TileShape large = tile_shape(LoraTile::kLarge);
  const int64_t large_tiles = blocks_of(m, large.rows) * blocks_of(n, large.columns);
  LoraLinearConfig config{};
  config.aligned = aligned;
  if (!aligned) {
    config.tile = LoraTile::kSmall;
    config.reason = "rows are not aligned to 16 bytes";
  } else if (large.shared_bytes() > device.shared_per_block) {
    config.tile = LoraTile::kSmall;
    config.reason = "the large tile does not fit into shared memory";
  } else if (m <= 64) {
    config.tile = LoraTile::kSmall;
    config.reason = "few rows: half of a large tile would be idle";
  } else if (large_tiles < device.sms) {
    config.tile = LoraTile::kSmall;
    config.reason = "fewer large tiles than SMs";
  } else {
    config.tile = LoraTile::kLarge;
    config.reason = "enough large tiles for every SM";
  }
  const TileShape tile = tile_shape(config.tile);
  config.rank_tile = rank <= 16 ? 16 : 64;
  const int64_t rows = blocks_of(m, tile.rows);
  config.blocks = rows * (blocks_of(rank, config.rank_tile) + blocks_of(n, tile.columns));
  config.group_rows = static_cast<int>(std::clamp<int64_t>(rows, 1, kGroupRows / tile.rows));
  config.counters = 2 + rows;
  return config;
}

}  // namespace lk
