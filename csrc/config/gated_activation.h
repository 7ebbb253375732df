// The grid of gated_activation and its gradients. No CUDA.
#pragma once

#include "../params/gated_activation.h"
#include "tiles.h"

namespace lk {

constexpr int kGatedThreads = 256;

struct GatedActivationConfig {
  bool aligned;  // all tensors begin at 16 bytes and are a multiple of 16 bytes long
  int64_t blocks;
};

// Elements of a thread: 16 bytes.
constexpr int gated_group(FloatType type, bool aligned) {
  return !aligned ? 1 : kChunkBytes / (type == FloatType::kFloat32 ? 4 : 2);
}

constexpr GatedActivationConfig gated_config(FloatType type, int64_t count, bool aligned) {
  const bool whole = aligned && count % gated_group(type, true) == 0;
  return {.aligned = whole, .blocks = blocks_of(count, static_cast<int64_t>(kGatedThreads) * gated_group(type, whole))};
}

}  // namespace lk
