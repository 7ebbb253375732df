// y = x wᵀ + bias + scaling · s bᵀ, s = x aᵀ, in one launch: schedules "dual" and "decode".
//
// Every block computes s for itself, beside its tile of y: r / kN more multiply-adds, and nobody waits. That pays where
// y is one tile wide (dual), and where there are so few rows that reading w is all that counts (decode, and dual for
// one block of rows). Where SMs would be idle the depth is split among blocks; the branch is linear in s, so each adds
// its own part of s times b. The last block of a tile to arrive sums the parts, in their order.
#pragma once

#include "between_blocks.cuh"
#include "lora_branch.cuh"

namespace lk {

template <class Base_, int kRankTile_, Access kAccess_>
struct LoraLinearDual {
  using Base = Base_;
  using Element = typename Base::Element;
  static constexpr Access kAccess = kAccess_;
  static constexpr int kRankTile = kRankTile_;
  static constexpr int kThreads = Base::kThreads, kM = Base::kM, kMinBlocks = 2;
  using Chunk = PlainChunk<Element, is_base_whole(kAccess)>;
  using Branch = LoraBranch<Base, kAccess>;
  using Shrink = ShrinkTask<Base, kRankTile, kAccess>;
  static constexpr int kSharedBytes = larger(Base::kSharedBytes, Base::kBytesResult);

  LK_DEVICE static void run(const LoraLinearParams& p) {
    const uint32_t smem = dynamic_shared();
    // Blocks of rows follow each other: neighbours share columns of w.
    const int rows = ceil_div(p.m, kM), tile = block_index() / p.splits, split = block_index() % p.splits;
    const int row_block = tile % rows, column_block = tile / rows;
    const int row0 = row_block * kM, column0 = column_block * Base::kN;
    const int k0 = split * p.split_depth, k1 = smaller(k0 + p.split_depth, p.k);
    const Operand x{p.x, p.x_stride, p.m, p.k}, w{p.w, p.w_stride, p.n, p.k};

    typename Base::Accumulator acc = {};
    Shrink shrink(p, k0, k1);
    Base::template run<Chunk, Chunk>(smem, x, row0, w, column0, k0, k1, acc, shrink);
    sync_block();  // the stages are free
    const bool is_split = p.splits > 1;
    float* const partial_s = column_block == 0 && is_split ? partials_of_s(p, row_block) + split * kPartialS : nullptr;
    Branch::add_own(p, smem, column0, shrink, partial_s, acc, [&] {
      if (column_block == 0 && !is_split) Branch::store_s(p, smem, row0);
    });
    if (is_split) {
      float* const partials = p.partials + static_cast<int64_t>(tile) * p.splits * kPartial<Base>;
      store_partial<Base>(partials + split * kPartial<Base>, acc);
      if (!arrive_last(p.counters + tile, p.splits, smem)) return;
      sum_partials<Base>(partials, p.splits, acc);
      if (column_block == 0) store_sum_of_s(p, row_block);
    }
    epilogue<Base>(p, smem, row0, column0, acc);
  }

 private:
  static constexpr int kPartialS = kM * kRankTile;

  // Behind the partials of y.
  LK_DEVICE static float* partials_of_s(const LoraLinearParams& p, int row_block) {
    const int64_t tiles = static_cast<int64_t>(ceil_div(p.m, kM)) * ceil_div(p.n, Base::kN);
    return p.partials + (tiles * kPartial<Base> + static_cast<int64_t>(row_block) * kPartialS) * p.splits;
  }

  LK_DEVICE static void store_sum_of_s(const LoraLinearParams& p, int row_block) {
    float* const partials = partials_of_s(p, row_block);
    for (int i = thread_index(); i < kPartialS / 2; i += kThreads) {
      const int row = row_block * kM + i / (kRankTile / 2), column = i % (kRankTile / 2) * 2;
      if (row >= p.m || column >= p.rank) continue;
      Float2 sum = {0.0f, 0.0f};
      for (int split = 0; split < p.splits; ++split) {
        const Float2 part = load_global(reinterpret_cast<const Float2*>(partials + split * kPartialS) + i);
        sum.x += part.x;
        sum.y += part.y;
      }
      auto* const s = static_cast<typename Element::Storage*>(p.s) + static_cast<int64_t>(row) * p.rank + column;
      if constexpr (is_s_whole(kAccess)) {
        store_global_pair<Element>(s, sum);
      } else {
        store_global_rounded<Element>(s, sum.x);
        if (column + 1 < p.rank) store_global_rounded<Element>(s + 1, sum.y);
      }
    }
  }
};

}  // namespace lk
