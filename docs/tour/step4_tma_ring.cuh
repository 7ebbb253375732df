// Step 4, a ring that the copy engine fills (TMA, sm_90): one thread asks for boxes, and 127 only multiply.
//
// In steps 2 and 3 every thread computes addresses, checks edges and copies 16 bytes, 16 times per stage. Here a tensor
// map, made once by the host, tells the engine of a matrix: address, rows, columns, the box, the order of chunks in a
// row. One instruction copies 128 rows of 128 bytes, with zeros from beyond the edges.
//
// Nobody holds a copy in registers or waits for its group: it counts its bytes at a barrier in shared memory.
//
//     full[i]    the bytes of stage i have arrived     expects them: who fills      waits: who multiplies
//     empty[i]   the four warps have left stage i      arrives: each warp           waits: who fills
//
// That is why no barrier of the block stands in the loop: a warp goes on as soon as its stage is full, whatever the
// others do. And the branch is no second loop that begins with empty stages: s and b are the last stages of the ring.
#pragma once

#include "device_sm90.h"
#include "step3_ticketed.cuh"

#if defined(__CUDACC__)
#define LK_GRID_CONSTANT __grid_constant__  // a map must lie where parameters do
#else
#define LK_GRID_CONSTANT
#endif

namespace lk::tour {

// Boxes have 64 columns, 128 bytes, whose chunks lie as SharedTile's do, and 128 rows; of a kRankTile, of w and b those
// of a tile's columns.
struct Maps {
  TensorMap x, w, a, s, b;
};

// One side's place in a ring of stages: after so many, stage and phase of its barriers follow.
template <int kSize>
struct Ring {
  static constexpr int kBytes = 2 * kSize * kBytesBarrier;
  uint32_t barriers, passed = 0;

  LK_DEVICE uint32_t stage() const { return passed % kSize; }
  LK_DEVICE uint32_t full() const { return barriers + stage() * kBytesBarrier; }
  LK_DEVICE uint32_t empty() const { return full() + kSize * kBytesBarrier; }
  // A barrier tells two phases apart. The one before the first counts as complete: stages begin empty.
  LK_DEVICE void wait_full() const { barrier_wait(full(), passed / kSize & 1); }
  LK_DEVICE void wait_empty() const { barrier_wait(empty(), (passed / kSize & 1) ^ 1); }

  LK_DEVICE void init(int readers) const {
    for (uint32_t i = 0; i < kSize; ++i) {
      barrier_init(barriers + i * kBytesBarrier, 1);
      barrier_init(barriers + (kSize + i) * kBytesBarrier, readers);
    }
    barrier_init_done();
  }
};

constexpr int kRing = 4, kOffsetRing = kRing * Tiled<kTileN>::kBytesStage;
constexpr int kOffsetRingWord = kOffsetRing + Ring<kRing>::kBytes, kRingSharedBytes = kOffsetRingWord + 4;

// acc += P Qᵀ, where load(t, stage, barrier) asks the engine for step t.
template <class Product, class Load>
LK_DEVICE void multiply_ring(uint32_t smem, int steps, typename Product::Accumulator& acc, const Load& load) {
  Ring<kRing> filled{smem + kOffsetRing}, read = filled;
  const auto fill = [&](int t) {
    if (thread_index() != 0 || t >= steps) return;
    filled.wait_empty();
    barrier_arrive_expecting(filled.full(), Product::kBytesStage);
    load(t, smem + filled.stage() * Product::kBytesStage, filled.full());
    ++filled.passed;
  };
  for (int t = 0; t < kRing - 1; ++t) fill(t);
  LK_NO_UNROLL
  for (int t = 0; t < steps; ++t, ++read.passed) {
    fill(t + kRing - 1);
    read.wait_full();
    sync_warp();  // ldmatrix is of whole warps
    Product::multiply(smem + read.stage() * Product::kBytesStage, acc);
    sync_warp();  // all lanes have read
    if (Product::lane() == 0) barrier_arrive(read.empty());
  }
}

LK_KERNEL(kThreads, 1) step4(const Problem p, const LK_GRID_CONSTANT Maps maps) {
  const uint32_t smem = dynamic_shared();
  if (thread_index() == 0) Ring<kRing>{smem + kOffsetRing}.init(kThreads / kWarp);
  const Work work = draw_work(p, smem + kOffsetRingWord);  // behind a barrier that shows the ring's
  const int row0 = work.row * kM, depths = ceil_div(p.k, kDepth);
  if (work.is_s) {
    using Product = Tiled<kRankTile>;
    Product::Accumulator acc = {};
    multiply_ring<Product>(smem, depths, acc, [&](int t, uint32_t stage, uint32_t barrier) {
      load_box(stage, &maps.x, t * kDepth, row0, barrier);
      load_box(stage + Product::kOffsetQ, &maps.a, t * kDepth, work.column * kRankTile, barrier);
    });
    Product::store(p.s, p.m, p.rank, row0, work.column * kRankTile, acc, p.scaling, nullptr);
    fence_proxy_async();  // the engine reads s, which threads have stored
    sync_block();
    if (thread_index() == 0) tell_s(p, work.row);
    return;
  }
  using Product = Tiled<kTileN>;
  Product::Accumulator acc = {};
  multiply_ring<Product>(smem, depths + ceil_div(p.rank, kDepth), acc, [&](int t, uint32_t stage, uint32_t barrier) {
    const bool is_branch = t >= depths;
    const int k = (is_branch ? t - depths : t) * kDepth;
    load_box(stage + Product::kOffsetQ, is_branch ? &maps.b : &maps.w, k, work.column * kTileN, barrier);
    if (t == depths) wait_for_s(p, work.row), fence_proxy_async();  // while b is on its way
    load_box(stage, is_branch ? &maps.s : &maps.x, k, row0, barrier);
  });
  Product::store(p.y, p.m, p.n, row0, work.column * kTileN, acc, 1.0f, p.bias);
}

}  // namespace lk::tour
