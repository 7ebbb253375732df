// The grids of prefix_kv and its gradient, which launches, kernels, plans and tests agree on. No CUDA.
#pragma once

#include "../params/prefix_kv.h"
#include "tiles.h"

namespace lk {

constexpr int kPrefixThreads = 256;

struct PrefixConfig {
  bool aligned;  // all rows of a head begin at 16 bytes and are a multiple of 16 bytes long
  int64_t blocks;
};

// Elements that a thread moves at a time: 16 bytes, of the wider type where there are two.
constexpr int prefix_group(FloatType type, FloatType prefix_type, bool aligned) {
  const bool narrow = type != FloatType::kFloat32 && type == prefix_type;
  return !aligned ? 1 : narrow ? 8 : 4;
}

// Blocks of one part: no block has two of them.
constexpr int64_t prefix_blocks(const PrefixSizes& s, int group) {
  return blocks_of(s.heads * s.tokens * blocks_of(s.head_dim, group), kPrefixThreads);
}

constexpr PrefixConfig prefix_config(const PrefixSizes& s, FloatType type, FloatType prefix_type, bool aligned) {
  return {.aligned = aligned, .blocks = s.parts * prefix_blocks(s, prefix_group(type, prefix_type, aligned))};
}

}  // namespace lk
