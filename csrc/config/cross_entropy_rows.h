// The grid of cross_entropy_rows, which launch, kernel, plan and tests agree on. No CUDA.
#pragma once

#include "../params/cross_entropy_rows.h"
#include "tiles.h"

namespace lk {

// A block has a row. Two blocks fill an SM's threads but for those that registers cost.
constexpr int kCrossEntropyThreads = 512;

struct CrossEntropyConfig {
  bool aligned;  // rows of logits begin at 16 bytes and are a multiple of 16 bytes long
  int64_t blocks;
};

constexpr CrossEntropyConfig cross_entropy_config(int64_t rows, bool aligned) {
  return {.aligned = aligned, .blocks = rows};
}

}  // namespace lk
