// The main loop on sm_90a, x wT: a ring of stages, which one thread has the copy engine fill, and two warpgroups, which
// multiply 64 rows of a tile each. Whoever reads a stage gives it back with an arrival of each warp, once its products
// are complete.
#pragma once

#include "../params/tensor_map.h"
#include "../tile.h"
#include "ring.cuh"

namespace lk {

// kTransposedW: w lies in memory as [depth, columns of y]. kCluster: blocks of a cluster, which work on the same
// columns of y at the same time. Each has the engine copy its part of these to all of them, over which w is read once.
// A stage is free when all of them have given it back.
template <class Element_, int kN_, bool kTransposedW, int kCluster = 1>
class WgmmaLoop {
  static_assert(kCluster == 1 || !kTransposedW);

 public:
  static constexpr bool kIsClustered = kCluster > 1;
  using Element = Element_;
  using Product = Warpgroup<Element>;
  using Accumulator = float[kN_ / 2];
  static constexpr int kM = 128, kN = kN_, kDepth = 64, kStages = 4;
  static constexpr int kGroups = 2, kGroupRows = kM / kGroups, kProductWarps = kGroups * kWarpgroup / kWarp;

  // A stage: kM rows of x, then kN columns of y, or in their place kDepth rows of panels of them. A row of each tile is
  // 128 bytes, swizzled.
  static constexpr int kRowBytes = 128, kPanelColumns = kRowBytes / 2, kBytesPanel = kDepth * kRowBytes;
  static_assert(kDepth * sizeof(typename Element::Storage) == kRowBytes);
  static constexpr int kOffsetW = kM * kRowBytes, kBytesStage = kOffsetW + kN * kRowBytes;
  static constexpr int kBytesStages = kStages * kBytesStage, kBytesBarriers = RingBarriers<kStages>::kBytes;

  LK_DEVICE static void init(uint32_t barriers) { RingBarriers<kStages>::init(barriers, 1, kCluster * kProductWarps); }

  // A side's position in the ring.
  LK_DEVICE WgmmaLoop(uint32_t stages, uint32_t barriers) : stages_(stages), barriers_(barriers) {
    if constexpr (kIsClustered) given_back_at_ = cluster_address(barriers, thread_index() % kCluster);
  }

  LK_DEVICE uint32_t stage() const { return stages_ + ring_.slot() * kBytesStage; }

  // ---------------------------------------------------------------------------------------------- the one who loads

  // fill(stage, barrier) of a stage that all have left, for so many bytes of copies that count at the barrier.
  template <class Fill>
  LK_DEVICE void fill_stage(int bytes, const Fill& fill) {
    barrier_wait(empty(barriers_, ring_.slot()), ring_.empty_parity());
    barrier_arrive_expecting(full(), bytes);
    fill(stage(), full());
    ring_.advance();
  }

  // Of w, or of what takes its place in a stage: kDepth from k on of kN columns of y.
  LK_DEVICE static void load_columns(uint32_t stage, const TensorMap* map, int k, int column, uint32_t barrier) {
    if constexpr (kTransposedW) {
      LK_UNROLL
      for (int i = 0; i < kN / kPanelColumns; ++i) {
        load_box(stage + kOffsetW + i * kBytesPanel, map, column + i * kPanelColumns, k, barrier);
      }
    } else if constexpr (kIsClustered) {
      const int part = static_cast<int>(cluster_rank()) * (kN / kCluster);
      load_box_cluster(stage + kOffsetW + static_cast<uint32_t>(part * kRowBytes), map, k, column + part, barrier,
                       (1u << kCluster) - 1);
    } else {
      load_box(stage + kOffsetW, map, k, column, barrier);
    }
  }

  // -------------------------------------------------------------------------------------------- those who multiply

  // use(stage), whose products are complete when it returns.
  template <class Use>
  LK_DEVICE void use_stage(const Use& use) {
    barrier_wait(full(), ring_.full_parity());
    use(stage());
    give_back(ring_.slot());
    ring_.advance();
  }

  // Of a stage: a group's rows of x, and the columns of y.
  LK_DEVICE static uint64_t rows_of(uint32_t stage, int group) {
    return matrix_descriptor(stage + static_cast<uint32_t>(group * kGroupRows * kRowBytes), 0, kEightRows);
  }
  LK_DEVICE static uint64_t columns_of(uint32_t stage) {
    return matrix_descriptor(stage + kOffsetW, kTransposedW ? kBytesPanel : 0, kEightRows);
  }
  // In units of a descriptor's address: 16 of the depth on, of the rows and of the columns.
  static constexpr int kFragmentDepth = 16, kNextRows = kFragmentDepth * 2 / 16;
  static constexpr int kNextColumns = kTransposedW ? kFragmentDepth * kRowBytes / 16 : kNextRows;

  // acc += x wT. A stage is given back when the products of the next one are issued and its own are complete.
  LK_DEVICE void multiply(int k, int group, Accumulator& acc) {
    const auto issue = [&] {
      barrier_wait(full(), ring_.full_parity());
      const uint64_t x = rows_of(stage(), group), w = columns_of(stage());
      multiply_fence();
      LK_UNROLL
      for (int i = 0; i < kDepth / kFragmentDepth; ++i) {
        Product::template multiply_add_async<kTransposedW>(acc, x + i * kNextRows, w + i * kNextColumns, true);
      }
      multiply_commit();
    };
    issue();
    uint32_t previous = ring_.slot();
    ring_.advance();
    LK_NO_UNROLL
    for (int left = ceil_div(k, kDepth) - 1; left > 0; --left) {
      issue();
      multiply_wait<1>();
      give_back(previous);
      previous = ring_.slot();
      ring_.advance();
    }
    multiply_wait<0>(acc);
    give_back(previous);
  }

 private:
  static constexpr int kEightRows = 8 * kRowBytes;

  LK_DEVICE uint32_t full() const { return RingBarriers<kStages>::full(barriers_, ring_.slot()); }
  LK_DEVICE static uint32_t empty(uint32_t barriers, uint32_t slot) {
    return RingBarriers<kStages>::empty(barriers, slot);
  }

  // In a cluster by one lane per block, to all who may load to here.
  LK_DEVICE void give_back(uint32_t slot) const {
    if constexpr (kIsClustered) {
      if (thread_index() % kWarp < kCluster) barrier_arrive_cluster(empty(given_back_at_, slot));
    } else {
      if (thread_index() % kWarp == 0) barrier_arrive(empty(barriers_, slot));
    }
  }

  uint32_t stages_, barriers_;
  uint32_t given_back_at_ = 0;  // barriers of the block that this lane tells
  Ring<kStages> ring_;
};

}  // namespace lk
