// Problem -> tile, schedule, grid of lora_linear and its gradients: what every launch, plan, the emulator and the tests
// agree on. Host only, no CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "tiles.h"

namespace lk {

enum class Schedule : int32_t { kTicketed, kColumn0, kDual, kDecode };

constexpr const char* name_of(Schedule schedule) {
  constexpr const char* kNames[] = {"ticketed", "column-0", "dual", "decode"};
  return kNames[static_cast<int>(schedule)];
}

enum class LoraRole : int32_t { kForward, kGradX };

// What tells the kernels of lora_linear and of the gradient of x apart.
struct LoraKey {
  LoraRole role;
  Schedule schedule;
  LoraTile tile;
  int rank_tile;  // columns of s that a block computes at a time
  bool aligned;   // rows begin at 16 bytes, and n, k and rank are multiples of a chunk's elements

  friend constexpr bool operator==(const LoraKey&, const LoraKey&) = default;
};

struct LoraLinearConfig {
  LoraKey key;
  int64_t blocks;    // one per tile of s and of y, and per split
  int group_rows;    // blocks of rows whose tickets follow each other
  int64_t counters;  // 32-bit words of workspace, zero before the launch
  int splits;        // parts of the depth (decode)
  int split_depth;
  int64_t partials;    // floats of workspace
  const char* reason;  // of the schedule
  const char* tile_reason;
};

// Rows of x that a group may span: its tiles share them through the L2 cache.
constexpr int kGroupRows = 1024;

constexpr int rank_tile_of(int64_t rank) { return rank <= 16 ? 16 : 64; }

// Where one block has all ranks of s, as in column-0, dual and decode.
constexpr int kMaxRankOfBlock = 64;

// Whether rows of these lengths are whole chunks, which `aligned` needs besides pointers and strides.
constexpr bool whole_chunks(int64_t n, int64_t k, int64_t rank, int element_bytes) {
  const int chunk = chunk_elements(element_bytes);
  return n % chunk == 0 && k % chunk == 0 && rank % chunk == 0;
}

// What ticketed and column-0 share: one ticket per tile.
inline void plan_tickets(int64_t m, int64_t n, int64_t rank, LoraLinearConfig& config) {
  const TileShape tile = tile_shape(config.key.tile);
  const int64_t rows = blocks_of(m, tile.rows);
  const int64_t shrink_columns = config.key.schedule == Schedule::kTicketed ? blocks_of(rank, config.key.rank_tile) : 0;
  config.blocks = rows * (shrink_columns + blocks_of(n, tile.columns));
  config.group_rows = static_cast<int>(std::clamp<int64_t>(rows, 1, kGroupRows / tile.rows));
  config.counters = 2 + rows;
}

// What dual and decode share: blocks that need no other's s. The depth is split while SMs are idle.
inline void plan_splits(int64_t m, int64_t n, int64_t k, int element_bytes, const DeviceLimits& device,
                        LoraLinearConfig& config) {
  constexpr int kBlocksPerSm = 4, kMinSteps = 4;  // a split has at least so many stages to stream
  const TileShape tile = tile_shape(config.key.tile);
  const int depth = tile.depth(element_bytes);
  const int64_t rows = blocks_of(m, tile.rows), tiles = rows * blocks_of(n, tile.columns);
  int64_t splits = 1;
  if (config.key.schedule == Schedule::kDecode && tiles > 0) {
    const int64_t most = std::max<int64_t>(1, blocks_of(k, depth) / kMinSteps);
    splits = std::clamp<int64_t>(kBlocksPerSm * device.sms / tiles, 1, most);
  }
  config.split_depth = static_cast<int>(blocks_of(blocks_of(k, depth), static_cast<int>(splits)) * depth);
  config.splits = config.split_depth == 0 ? 1 : static_cast<int>(blocks_of(k, config.split_depth));
  config.blocks = tiles * config.splits;
  if (config.splits == 1) return;
  config.counters = tiles;
  config.partials = config.splits * (tiles * tile.rows * tile.columns + rows * tile.rows * config.key.rank_tile);
}

// How a forward of y [m, n] from x [m, k] with this rank is launched. element_bytes: of x.
inline LoraLinearConfig lora_linear_config(int64_t m, int64_t n, int64_t k, int64_t rank, int element_bytes,
                                           bool aligned, bool has_dropout, const DeviceLimits& device) {
  LoraLinearConfig config{};
  config.key.role = LoraRole::kForward;
  config.key.aligned = aligned;
  config.key.rank_tile = rank_tile_of(rank);
  config.splits = 1;
  const bool fits_one_block = aligned && !has_dropout && rank <= kMaxRankOfBlock;
  if (fits_one_block && m <= tile_shape(LoraTile::kFlat).rows) {
    config.key.schedule = Schedule::kDecode;
    config.reason = "few rows: reading w is all that counts, and blocks share out its columns and the depth";
    config.key.tile = LoraTile::kFlat;
    config.tile_reason = "few rows";
  } else if (fits_one_block && n <= tile_shape(LoraTile::kSmall).columns) {
    config.key.schedule = Schedule::kDual;
    config.reason = "y is one tile wide: no other block needs these rows of s";
    config.key.tile = LoraTile::kSmall;
    config.tile_reason = "y is no wider";
  } else {
    config.key.tile = choose_tile(m, n, aligned, device, config.tile_reason);
    if (fits_one_block && config.key.tile == LoraTile::kLarge && config.key.rank_tile == 64) {
      config.key.schedule = Schedule::kColumn0;
      config.reason = "one block per SM: nobody would fill the gap while it waits for a tile of s";
    } else {
      config.key.schedule = Schedule::kTicketed;
      config.reason = has_dropout              ? "dropout is applied once, in tiles of s alone"
                      : rank > kMaxRankOfBlock ? "the rank is too large for one block"
                      : !aligned               ? "rows are not aligned to 16 bytes"
                                               : "several blocks per SM: tiles of s run beside tiles of y";
    }
  }
  if (config.key.schedule == Schedule::kDual || config.key.schedule == Schedule::kDecode) {
    plan_splits(m, n, k, element_bytes, device, config);
  } else {
    plan_tickets(m, n, rank, config);
  }
  return config;
}

struct LoraGradsKey {
  int rank_tile;
  bool aligned;

  friend constexpr bool operator==(const LoraGradsKey&, const LoraGradsKey&) = default;
};

struct LoraGradsConfig {
  LoraGradsKey key;
  int splits, split_rows;  // parts of the rows
  int64_t blocks;
  int64_t counters;  // 32-bit words of workspace, zero before the launch
  int64_t partials;  // floats of workspace
};

// Two launches: dX = dY W + ... with s' = dY B (s' alone where dX is not wanted), then dA and dB.
struct LoraBackwardConfig {
  LoraLinearConfig grad_x;  // no blocks: neither dX nor dA is wanted
  // Blocks of rows of which the first launch leaves parts of dB for the second to sum, or 0: the second reads dY again.
  int64_t parts_of_grad_b;
  int64_t partial_grad_b;  // floats of workspace
  LoraGradsConfig grads;
};

// dA [rank, k] and dB [n, rank] over m rows. k or n is 0 where the gradient is not wanted.
inline LoraGradsConfig lora_grads_config(int64_t m, int64_t n, int64_t k, int64_t rank, int64_t parts_of_grad_b,
                                         bool aligned, const DeviceLimits& device) {
  constexpr int kColumns = 128, kDepth = 32, kBlocksPerSm = 2, kMinRows = 256;
  LoraGradsConfig config{};
  config.key = {.rank_tile = rank_tile_of(rank), .aligned = aligned};
  const int64_t columns = blocks_of(k, kColumns) + (parts_of_grad_b > 0 ? 0 : blocks_of(n, kColumns));
  const int64_t tiles = columns * blocks_of(rank, config.key.rank_tile);
  const int64_t most = std::max<int64_t>(1, m / kMinRows);
  const int64_t splits = tiles == 0 ? 1 : std::clamp<int64_t>(kBlocksPerSm * device.sms / tiles, 1, most);
  config.split_rows = static_cast<int>(blocks_of(blocks_of(m, static_cast<int>(splits)), kDepth) * kDepth);
  config.splits = config.split_rows == 0 ? 1 : static_cast<int>(blocks_of(m, config.split_rows));
  config.blocks = tiles * config.splits + (parts_of_grad_b > 0 ? blocks_of(n, kColumns) : 0);
  if (config.splits == 1) return config;
  config.counters = tiles;
  config.partials = tiles * config.splits * kColumns * config.key.rank_tile;
  return config;
}

// How the gradients for dY [m, n] and x [m, k] are launched.
inline LoraBackwardConfig lora_backward_config(int64_t m, int64_t n, int64_t k, int64_t rank, bool aligned, bool need_x,
                                               bool need_a, bool need_b, const DeviceLimits& device) {
  LoraBackwardConfig config{};
  LoraLinearConfig& grad_x = config.grad_x;
  grad_x.key.role = LoraRole::kGradX;
  grad_x.key.schedule = Schedule::kTicketed;
  grad_x.key.aligned = aligned;
  grad_x.key.rank_tile = rank_tile_of(rank);
  grad_x.splits = 1;
  grad_x.reason = "tiles of s' also compute parts of dB while they have dY";
  grad_x.key.tile = choose_tile(m, k, aligned, device, grad_x.tile_reason);
  if (need_x || need_a) plan_tickets(m, need_x ? k : 0, rank, grad_x);
  // Parts of dB take as much traffic per rank as 1/32 of dY: beyond a narrow rank tile it is cheaper to read dY twice.
  if (need_b && grad_x.blocks > 0 && grad_x.key.rank_tile == 16) {
    config.parts_of_grad_b = blocks_of(m, tile_shape(grad_x.key.tile).rows);
    config.partial_grad_b = config.parts_of_grad_b * n * grad_x.key.rank_tile;
  }
  config.grads = lora_grads_config(m, need_b ? n : 0, need_a ? k : 0, rank, config.parts_of_grad_b, aligned, device);
  return config;
}

}  // namespace lk
