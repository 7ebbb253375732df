// Tiles of matrix products, and what a choice of them depends on. Host only, no CUDA.
#pragma once

#include <cstdint>

namespace lk {

// The device as far as a choice depends on it.
struct DeviceLimits {
  int sms;
  int shared_per_block;             // what a block may opt in to, bytes
  int capability;                   // 10 * major + minor
  bool encodes_tensor_maps = true;  // the driver makes what the copy engine of sm_90 is told, and so does this build
};

constexpr int kChunkBytes = 16;  // what one cp.async, one ldmatrix row and one wide store move

constexpr int chunk_elements(int element_bytes) { return kChunkBytes / element_bytes; }

// Elements between neighbouring rows, at most: the distance of rows within a tile is reckoned in 32 bits (RowWalk).
constexpr int64_t kMaxRowStride = 1 << 25;

// How many blocks of this size cover `size`.
constexpr int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

enum class LoraTile : int32_t {
  kLarge,        // 128 x 128
  kSmall,        // 64 x 64, for problems that leave SMs idle with the large one
  kFlat,         // 16 x 64, for a few rows
  kNarrow,       // 64 x 16, of s alone
  kWide,         // 64 x 128, likewise
  kBranch,       // 128 x 128, for products as shallow as a rank
  kWgmma,        // 128 x 256, of two warpgroups
  kNarrowWgmma,  // 128 x 128, likewise
};

struct TileShape {
  int rows, columns, depth_bytes, stages;
  constexpr int depth(int element_bytes) const { return depth_bytes / element_bytes; }
  constexpr int shared_bytes() const { return stages * (rows + columns) * depth_bytes; }
};

constexpr TileShape tile_shape(LoraTile tile) {
  constexpr TileShape kShapes[] = {{128, 128, 64, 4}, {64, 64, 128, 3},  {16, 64, 128, 4},   {64, 16, 128, 4},
                                   {64, 128, 128, 3}, {128, 128, 64, 2}, {128, 256, 128, 4}, {128, 128, 128, 4}};
  return kShapes[static_cast<int>(tile)];
}

// Time to compute tiles that the SMs take one after the other, in units of a large tile's. A small tile reads twice as
// much of x and w per multiply-add. A model: it orders, it does not predict.
inline double modelled_time(int64_t m, int64_t n, LoraTile tile, const DeviceLimits& device) {
  const TileShape shape = tile_shape(tile);
  const int64_t tiles = blocks_of(m, shape.rows) * blocks_of(n, shape.columns);
  return static_cast<double>(blocks_of(tiles, device.sms)) * (tile == LoraTile::kLarge ? 1.0 : 0.35);
}

inline LoraTile choose_tile(int64_t m, int64_t n, const DeviceLimits& device, const char*& reason) {
  if (tile_shape(LoraTile::kLarge).shared_bytes() > device.shared_per_block) {
    reason = "the large tile does not fit into shared memory";
  } else if (m <= 64) {
    reason = "few rows: half of a large tile would be idle";
  } else if (modelled_time(m, n, LoraTile::kLarge, device) > modelled_time(m, n, LoraTile::kSmall, device)) {
    reason = "small tiles fill the waves of SMs better";
  } else {
    reason = "large tiles fill the waves of SMs well";
    return LoraTile::kLarge;
  }
  return LoraTile::kSmall;
}

}  // namespace lk
