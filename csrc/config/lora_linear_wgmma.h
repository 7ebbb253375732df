// Problem -> tile, grid and boxes of lora_linear and of its gradient of x on sm_90a, schedule "wgmma". Host only, no
// CUDA.
#pragma once

#include "lora_linear.h"

namespace lk {

// Shared memory of a launch with the wide tile: four stages of 48 KB, staging tiles of y, and barriers.
constexpr int kWgmmaSharedBytes = 225 << 10;

// Blocks of a cluster, where it is asked for clusters.
constexpr int kWgmmaCluster = 2;

// Columns of s that a warp computes at a time: what registers are there for.
constexpr int wgmma_rank_tile_of(int64_t rank) { return rank <= 16 ? 16 : 48; }

// Why a forward, or dX, is none for wgmma; null: it is one. y_is_whole: its rows are whole chunks of 16 bytes.
inline const char* misfit_of_wgmma(int element_bytes, int64_t depth, Access access, bool y_is_whole,
                                   const DeviceLimits& device) {
  if (device.capability != 90 || device.shared_per_block < kWgmmaSharedBytes) {
    return "wgmma does not fit: it is sm_90's alone; what is best without it";
  }
  if (!device.encodes_tensor_maps) {
    return "wgmma does not fit: this build, or the driver, makes no tensor maps; what is best without it";
  }
  if (element_bytes != 2) return "wgmma does not fit: its kernel is for bf16 and fp16; what is best without it";
  if (access != Access::kWhole || !y_is_whole) {
    return "wgmma does not fit: the copy engine reads and writes rows of whole chunks of 16 bytes; what is best "
           "without it";
  }
  if (depth == 0) return "wgmma does not fit: there is nothing to sum; what is best without it";
  return nullptr;
}

// Whether a forward, or dX, is wgmma's. No reason: nobody has asked, and another schedule has reasons of its own.
struct UsesWgmma {
  bool yes;
  const char* reason;
};

// For y [m, n], or dX. The branch as launches around the vendor's GEMM takes a fifth more than the product alone (on an
// H200); here it is reckoned at a fiftieth: 0.85 of the vendor's rate would do. A public main loop of this structure
// has 0.97 on an H100 (pranjalssh/fast.cu). Where tiles are few, that is lost to SMs that have none.
inline UsesWgmma uses_wgmma(const char* misfit, int64_t m, int64_t n, const DeviceLimits& device, Wanted wanted) {
  constexpr int64_t kMinRows = 256;
  if (is_wgmma(wanted)) {
    return {misfit == nullptr, misfit != nullptr ? misfit : "as asked: wgmma, its operands by the copy engine"};
  }
  if (wanted != Wanted::kBest || misfit != nullptr || m < kMinRows) return {false, nullptr};
  const TileShape narrow = tile_shape(LoraTile::kNarrowWgmma);
  if (blocks_of(m, narrow.rows) * blocks_of(n, narrow.columns) < device.sms) return {false, nullptr};
  return {true,
          "sm_90: the branch as one more stage of a main loop by wgmma is reckoned at less than launches around the "
          "vendor's GEMM, which took a fifth on an H200; itself it has run on no GPU yet"};
}

// Of y [m, n] from x [m, k], or of dX from dY. rounds_adapters: they are fp32, and the launch has room for both factors
// in 16-bit elements.
inline LoraLinearConfig wgmma_config(LoraRole role, int64_t m, int64_t n, int64_t k, int64_t rank, bool rounds_adapters,
                                     const DeviceLimits& device) {
  LoraLinearConfig config{};
  config.splits = 1;
  config.reason = role == LoraRole::kForward ? "blocks stay on their SMs; warps that would be idle compute s"
                                             : "blocks stay on their SMs; tiles of s' also compute parts of dB while "
                                               "they have dY; warps that would be idle make the mask";
  const auto tiles = [&](LoraTile tile) {
    return blocks_of(m, tile_shape(tile).rows) * blocks_of(n, tile_shape(tile).columns);
  };
  // A narrow tile reads half as much again per multiply-add. A model: it orders, it does not predict.
  const double wide = static_cast<double>(blocks_of(tiles(LoraTile::kWgmma), device.sms));
  const double narrow = 0.55 * static_cast<double>(blocks_of(tiles(LoraTile::kNarrowWgmma), device.sms));
  const LoraTile tile = narrow < wide ? LoraTile::kNarrowWgmma : LoraTile::kWgmma;
  config.tile_reason = narrow < wide ? "narrow tiles fill the waves of SMs better" : "wide tiles read least";
  config.key = {role, Schedule::kWgmma, tile, wgmma_rank_tile_of(rank), Access::kWhole};
  config.blocks = std::min<int64_t>(tiles(tile), device.sms);
  const int64_t rows = blocks_of(m, tile_shape(tile).rows);
  // Tickets of tiles and of slabs of s, and a flag per block of rows; tickets of rounding, and what is done of it.
  config.counters = 2 + rows + (rounds_adapters ? 2 : 0);
  if (rounds_adapters) config.partials = (n + k) * rank / 2;
  config.group_rows = static_cast<int>(std::clamp<int64_t>(rows, 1, kGroupRows / tile_shape(tile).rows));
  return config;
}

// The same in clusters, which share w and b. Only where somebody asks: no GPU has shown yet that it is faster.
inline void plan_clusters(int64_t m, int64_t n, const DeviceLimits& device, LoraLinearConfig& config) {
  const TileShape wide = tile_shape(LoraTile::kWgmma);
  const int64_t rows = blocks_of(m, wide.rows), pairs = blocks_of(rows, kWgmmaCluster);
  if (config.key.role != LoraRole::kForward) {
    config.tile_reason = "clusters as asked are for forwards alone: without";
  } else if (rows == 1 || device.sms < kWgmmaCluster) {
    config.tile_reason = "clusters as asked take two blocks of rows, and two SMs: without";
  } else {
    config.key.tile = LoraTile::kWgmma;
    config.key.cluster = kWgmmaCluster;
    config.tile_reason = "wide tiles, two blocks of rows in a cluster read w and b once; no GPU has shown that it wins";
    const int64_t tiles = pairs * kWgmmaCluster * blocks_of(n, wide.columns);
    config.blocks = std::min<int64_t>(tiles, device.sms / kWgmmaCluster * kWgmmaCluster);
    config.group_rows = static_cast<int>(std::clamp<int64_t>(pairs, 1, kGroupRows / wide.rows / kWgmmaCluster));
  }
}

}  // namespace lk
