// The grid of dequantize, which launch, kernel, plan and tests agree on. No CUDA.
#pragma once

#include "../params/packed_weight.h"
#include "tiles.h"

namespace lk {

constexpr int kDequantizeThreads = 256;

// What a warp decodes: two 16-byte reads for each lane, which is how far its loads are ahead.
constexpr int kWarpPackedBytes = 1024;

// Neighbours that are written by one 16-byte store, at most: they have to have one scale.
constexpr int kMostGroup = 8;

// The least block of codes4 that is read 16 bytes at a time: a warp has its scales in shared memory, so few.
constexpr int64_t kLeastWholeBlock = 16;

struct DequantizeConfig {
  bool aligned;    // packed weights are read, and weights written, 16 bytes at a time
  int64_t blocks;  // of threads
};

constexpr int packed_bits(PackedLayout layout) { return is_codes4(layout) ? 4 : 8; }

// Of a block of threads. Where it is not aligned, a thread has one byte.
constexpr int64_t weights_per_block(PackedLayout layout, bool aligned) {
  return int64_t{kDequantizeThreads} * (aligned ? kWarpPackedBytes / 32 : 1) * 8 / packed_bits(layout);
}

// Whether an index is shifted to be that of its block: the kernel that reads 16 bytes at a time does not divide.
constexpr bool is_shifted(int64_t block, int64_t least, int64_t size) {
  return block >= size || (block >= least && (block & (block - 1)) == 0);
}

constexpr bool has_whole_groups(const PackedParts& w) {
  if (is_codes4(w.layout)) return is_shifted(w.block, kLeastWholeBlock, INT64_MAX);
  return w.k % kMostGroup == 0 && is_shifted(w.block, kMostGroup, w.k) && is_shifted(w.block_rows, 1, w.n);
}

// aligned: the packed weights begin at 16 bytes.
constexpr DequantizeConfig dequantize_config(const PackedParts& w, bool aligned) {
  const bool whole = aligned && has_whole_groups(w);
  return {.aligned = whole, .blocks = blocks_of(int64_t{w.n} * w.k, weights_per_block(w.layout, whole))};
}

}  // namespace lk
