// The grid of dequantize, which launch, kernel, plan and tests agree on. No CUDA.
#pragma once

#include "../params/packed_weight.h"
#include "tiles.h"

namespace lk {

constexpr int kDequantizeThreads = 256;

// Weights that a warp decodes: two 16-byte reads of packed ones for each lane, which is how far its loads are ahead.
constexpr int kWarpWeights = 2048;

// The least block of weights with a scale that is read 16 bytes at a time: these are 32 weights, and a warp's scales
// few.
constexpr int64_t kLeastWholeBlock = 32;

struct DequantizeConfig {
  bool aligned;    // packed weights are read, and weights written, 16 bytes at a time
  int64_t blocks;  // of threads
};

// Of a block of threads.
constexpr int64_t weights_per_block(bool aligned) {
  return aligned ? kDequantizeThreads / 32 * kWarpWeights : kDequantizeThreads * 2;
}

// aligned: the packed weights begin at 16 bytes. Where their blocks are whole chunks, all that a lane reads then is.
constexpr DequantizeConfig dequantize_config(int64_t count, int64_t block, bool aligned) {
  const bool whole = aligned && block >= kLeastWholeBlock && block <= INT32_MAX && (block & (block - 1)) == 0;
  return {.aligned = whole, .blocks = blocks_of(count, weights_per_block(whole))};
}

}  // namespace lk
