// Adapters in pools, as the device finds them: by number.
#pragma once

#include "../params/multi_lora_linear.h"
#include "../tile.h"

namespace lk {

LK_DEVICE int64_t integer_at(const Integers& all, int64_t i) {
  if (all.are_wide) return load_global(static_cast<const int64_t*>(all.data) + i * all.stride);
  return load_global(static_cast<const int32_t*>(all.data) + i * all.stride);
}

// One of them. That of a row without an adapter has no ranks.
struct PoolAdapter {
  int64_t number;
  int rank;
  float scaling;
};

// most, scaling: the launch's.
LK_DEVICE PoolAdapter adapter_in(const AdapterPools& pools, int64_t number, int most, float scaling) {
  if (number < 0 || number >= pools.count) return {0, 0, 0.0f};
  int rank = most;
  if (pools.ranks.data != nullptr) {
    const int64_t own = integer_at(pools.ranks, number);
    rank = own < 0 ? 0 : own > most ? most : static_cast<int>(own);
  }
  if (pools.scalings != nullptr) scaling *= load_global(pools.scalings + number * pools.scalings_step);
  return {number, rank, scaling};
}

}  // namespace lk
