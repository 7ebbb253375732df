// The grid of dequantize, which launch, kernel, plan and tests agree on. No CUDA.
#pragma once

#include <algorithm>

#include "../params/dequantize.h"
#include "tiles.h"

namespace lk {

constexpr int kDequantizeThreads = 256, kDequantizeWarps = kDequantizeThreads / 32;

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

// What a warp has of one run; a thread, where it is not aligned: one byte.
constexpr int64_t weights_at_once(PackedLayout layout, bool aligned) {
  return (aligned ? kWarpPackedBytes : 1) * 8 / packed_bits(layout);
}
constexpr int64_t shares_of_run(PackedLayout layout, bool aligned, const WeightRuns& runs) {
  return blocks_of(runs.length, weights_at_once(layout, aligned));
}

// Whether an index is shifted to be that of its block: the kernel that reads 16 bytes at a time does not divide.
constexpr bool is_shifted(int64_t block, int64_t least, int64_t size) {
  return block >= size || (block >= least && (block & (block - 1)) == 0);
}

constexpr bool has_whole_groups(const PackedParts& w) {
  if (is_codes4(w.layout)) return is_shifted(w.block, kLeastWholeBlock, INT64_MAX);
  return w.k % kMostGroup == 0 && is_shifted(w.block, kMostGroup, w.k) && is_shifted(w.block_rows, 1, w.n);
}

// Whether a number of weights is one of whole 16 bytes of packed ones.
constexpr bool is_whole_chunks(PackedLayout layout, int64_t weights) {
  return weights % (kChunkBytes * 8 / packed_bits(layout)) == 0;
}

// Whether what a warp has of a run begins at 16 bytes, and where a block of codes4 does or where all of it lies in one.
constexpr bool has_whole_runs(const PackedParts& w, const WeightRuns& runs) {
  const int64_t whole = is_codes4(w.layout) ? std::min<int64_t>(w.block, weights_at_once(w.layout, true)) : 1;
  const bool begins = is_whole_chunks(w.layout, runs.first) && runs.first % whole == 0;
  if (runs.count == 1) return begins;
  return begins && is_whole_chunks(w.layout, runs.stride) && runs.stride % whole == 0 && runs.length % kMostGroup == 0;
}

// aligned: the packed weights begin at 16 bytes.
constexpr DequantizeConfig dequantize_config(const PackedParts& w, const WeightRuns& runs, bool aligned) {
  const bool whole = aligned && has_whole_groups(w) && has_whole_runs(w, runs);
  const int64_t shares = runs.count * shares_of_run(w.layout, whole, runs);
  return {.aligned = whole, .blocks = blocks_of(shares, whole ? kDequantizeWarps : kDequantizeThreads)};
}

}  // namespace lk
