// The low-rank products by themselves, in schedule "cublas": s = dropout(x) aᵀ (shrink), then
// y = scaling · s bᵀ + bias (expand), onto which the vendor's GEMM accumulates x wᵀ.
//
// Both move memory: shrink reads x once, expand writes y once. The GEMM reads y in its epilogue, where tensor cores are
// busy with the next tile; added afterwards, the branch would cost a pass over y of its own. Where nothing is dropped
// on the way to s, it is a product of the vendor's, too.
#pragma once

#include "lora_linear.cuh"

namespace lk {

// A block has kM rows of s, a tile of ranks and part of the depth; of a tile's blocks, the last one to arrive sums the
// parts, in their order.
template <class Base_, Access kAccess_>
struct LoraShrink {
  using Base = Base_;
  using Element = typename Base::Element;
  static constexpr Access kAccess = kAccess_;
  static constexpr int kRankTile = Base::kN, kThreads = Base::kThreads, kM = Base::kM;
  static constexpr int kMinBlocks = kRankTile <= 64 ? 3 : 2;
  static constexpr int kSharedBytes = larger(Base::kSharedBytes, Base::kBytesResult);

  LK_DEVICE static void run(const LoraLinearParams& p) {
    const uint32_t smem = dynamic_shared();
    const int columns = ceil_div(p.rank, kRankTile), tile = block_index() / p.splits, split = block_index() % p.splits;
    const int row0 = tile / columns * kM, column0 = tile % columns * kRankTile;
    const int k0 = split * p.split_depth, k1 = smaller(k0 + p.split_depth, p.k);
    typename Base::Accumulator acc = {};
    with_adapter_chunk<Element, is_a_whole(kAccess, Base::kFactors)>(p.adapters_are_float, [&](auto chunk) {
      Base::template run<PlainChunk<Element, is_base_whole(kAccess)>, decltype(chunk)>(
          smem, {p.x, p.x_stride, p.m, p.k}, row0, {p.a, p.a_stride, p.rank, p.k}, column0, k0, k1, acc,
          DropX<Base>{row0, DropoutMask(p, p.k)});
    });
    sync_block();  // the stages are free
    if (p.splits > 1) {
      float* const partials = p.partials + static_cast<int64_t>(tile) * p.splits * kPartial<Base>;
      store_partial<Base>(partials + split * kPartial<Base>, acc);
      if (!arrive_last(p.counters + tile, p.splits, smem)) return;
      sum_partials<Base>(partials, p.splits, acc);
      sync_block();  // arrive_last's word is free
    }
    stage_accumulators<Base>(smem, [&](int mi, int ni, int i, int) { return p.dropout_scale * acc[mi][ni][i]; });
    sync_block();
    store_tile<Element, kM, kRankTile, kThreads>(smem, p.s, p.rank, p.m, p.rank, row0, column0, is_s_whole(kAccess));
  }
};

// A tile of y. Dropped elements of the gradient of x's branch are zeroed where they lie in shared memory.
template <class Base_, Access kAccess_, class Roles>
struct LoraExpand {
  using Base = Base_;
  using Element = typename Base::Element;
  static constexpr Access kAccess = kAccess_;
  static constexpr int kRankTile = 0;  // any rank
  static constexpr int kThreads = Base::kThreads, kMinBlocks = 2;
  static constexpr int kSharedBytes = larger(Base::kSharedBytes, Base::kBytesResult);

  LK_DEVICE static void run(const LoraLinearParams& p) {
    const uint32_t smem = dynamic_shared();
    const int columns = ceil_div(p.n, Base::kN);
    const int row0 = block_index() / columns * Base::kM, column0 = block_index() % columns * Base::kN;
    typename Base::Accumulator acc = {};
    with_adapter_chunk<Element, is_b_whole(kAccess, Base::kFactors)>(p.adapters_are_float, [&](auto chunk) {
      Base::template run<PlainChunk<Element, is_s_whole(kAccess)>, decltype(chunk)>(
          smem, {p.s, p.rank, p.m, p.rank}, row0, {p.b, p.b_stride, p.n, p.rank}, column0, 0, p.rank, acc,
          NoSideTask{});
    });
    const bool drops = !Roles::kDropsX && p.seed != nullptr;
    const float scale = drops ? p.scaling * p.dropout_scale : p.scaling;
    LK_UNROLL
    for (auto& row : acc) {
      LK_UNROLL
      for (auto& fragment : row) {
        LK_UNROLL
        for (float& sum : fragment) sum *= scale;
      }
    }
    stage_with_bias<Base>(p, smem, column0, acc);
    if (drops) {
      const DropoutMask mask(p, p.n);
      drop_tile<SharedTile<Base::kN, sizeof(typename Element::Storage)>, Base::kM, kThreads>(smem, NextRows{row0},
                                                                                             column0, mask);
      sync_block();
    }
    store_tile<Element, Base::kM, Base::kN, kThreads>(smem, p.y, p.y_stride, p.m, p.n, row0, column0,
                                                      is_y_whole<Element>(p));
  }
};

}  // namespace lk
