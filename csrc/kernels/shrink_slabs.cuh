// s = dropout(x) aT by warps that would be idle beside products of warpgroups: no shared memory, no tile, just slabs of
// 16 rows, one per warp, straight from memory to mma.sync.
#pragma once

#include "../device_sm90.h"
#include "between_blocks.cuh"
#include "dropout.cuh"

namespace lk {

// Of the launch's counters: tickets of slabs, in the place of blocks that are done.
constexpr int kSlabCounter = kDoneCounter;

// Rows of x and a are whole chunks, and so is the rank. kBlockRows: of a block of rows, whose flag counts slabs.
template <class Element, int kRankTile, int kBlockRows>
class ShrinkSlabs {
  static constexpr int kRows = 16, kFragments = kRankTile / 8, kStep = 32;
  // More of a would take too many registers, and lies in the L1 cache.
  static constexpr bool kLoadsAhead = kFragments <= 2;

 public:
  // What the flag of a block of rows counts up to when its s is there.
  LK_DEVICE static uint32_t expected(const LoraLinearParams& p, int block) {
    const int rows = smaller(kBlockRows, p.m - block * kBlockRows);
    return static_cast<uint32_t>(ceil_div(rows, kRows) * ceil_div(p.rank, kRankTile));
  }

  // A warp's share of the launch.
  LK_DEVICE static void run(const LoraLinearParams& p) {
    const int lane = thread_index() % kWarp, rank_tiles = ceil_div(p.rank, kRankTile);
    const int tickets = ceil_div(p.m, kRows) * rank_tiles;
    LK_NO_UNROLL
    for (;;) {
      const int ticket = static_cast<int>(broadcast(lane == 0 ? atomic_add(p.counters + kSlabCounter, 1) : 0));
      if (ticket >= tickets) return;
      const int row0 = ticket / rank_tiles * kRows, rank0 = ticket % rank_tiles * kRankTile;
      if (p.seed != nullptr) {
        compute<true>(p, row0, rank0);
      } else {
        compute<false>(p, row0, rank0);
      }
      fence_proxy_async();  // the copy engine reads s
      sync_warp();
      if (lane == 0) atomic_add_acquire_release(p.counters + kFirstFlag + row0 / kBlockRows, 1);
    }
  }

 private:
  struct Loaded {
    Vec16 x[2], a[kLoadsAhead ? kFragments : 1];
  };

  // A product is a sum over the depth in any order, the same of both factors: lane i of a quad takes eight elements
  // that follow each other, a load of 16 bytes and a group of the mask, for fragments of two steps of mma.
  template <bool kDrops>
  LK_DEVICE static void compute(const LoraLinearParams& p, int row0, int rank0) {
    const int lane = thread_index() % kWarp, row = row0 + lane / 4;
    const auto* const a = static_cast<const uint16_t*>(p.a) + (rank0 + lane / 4) * p.a_stride;
    const auto* const x = static_cast<const uint16_t*>(p.x) + smaller(row, p.m - 1) * p.x_stride;
    const int eighth = row + 8 < p.m ? static_cast<int>(8 * p.x_stride) : 0;  // rows past the last are not stored
    const int fragments = smaller(kFragments, (p.rank - rank0) / 8);
    const auto load_a = [&](int i, int k) {
      const bool is_there = k < p.k && i < fragments;
      const int offset = i * 8 * static_cast<int>(p.a_stride) + k;  // 31 bits: kMaxRowStride
      return is_there ? load_global(reinterpret_cast<const Vec16*>(a + offset)) : Vec16{};
    };
    const auto load = [&](int k) {
      Loaded v{};
      LK_UNROLL
      for (int i = 0; i < 2; ++i) {
        if (k < p.k) v.x[i] = load_global(reinterpret_cast<const Vec16*>(x + i * eighth + k));
      }
      if constexpr (kLoadsAhead) {
        LK_UNROLL
        for (int i = 0; i < kFragments; ++i) v.a[i] = load_a(i, k);
      }
      return v;
    };
    float acc[kFragments][4] = {};
    int k = lane % 4 * 8;
    Loaded next = load(k);
    LK_NO_UNROLL
    for (int left = ceil_div(p.k, kStep); left > 0; --left, k += kStep) {
      Loaded v = next;
      next = load(k + kStep);
      if constexpr (kDrops) drop(v.x, DropoutMask(p, p.k), row, k);
      LK_UNROLL
      for (int i = 0; i < kFragments; ++i) {
        const Vec16 factor = kLoadsAhead ? v.a[kLoadsAhead ? i : 0] : load_a(i, k);
        LK_UNROLL
        for (int step = 0; step < 4; step += 2) {
          const uint32_t rows[4] = {v.x[0].word[step], v.x[1].word[step], v.x[0].word[step + 1], v.x[1].word[step + 1]};
          Element::multiply_add(acc[i], rows, factor.word[step], factor.word[step + 1]);
        }
      }
    }
    store(p, row, rank0, acc, kDrops ? p.dropout_scale : 1.0f);
  }

  // Eight elements of two rows, eight apart.
  LK_DEVICE static void drop(Vec16 (&x)[2], const DropoutMask& mask, int row, int k) {
    LK_UNROLL
    for (int i = 0; i < 2; ++i) {
      const PhiloxWords words = mask.words(row + i * 8, k);
      LK_UNROLL
      for (int j = 0; j < 4; ++j) {
        x[i].word[j] &= (dropout_bits(words, 2 * j) >= mask.threshold ? 0x0000FFFFu : 0u) |
                        (dropout_bits(words, 2 * j + 1) >= mask.threshold ? 0xFFFF0000u : 0u);
      }
    }
  }

  LK_DEVICE static void store(const LoraLinearParams& p, int row0, int rank0, const float (&acc)[kFragments][4],
                              float scale) {
    LK_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + half * 8;
      if (row >= p.m) continue;
      auto* const s = static_cast<uint16_t*>(p.s) + static_cast<int64_t>(row) * p.rank;
      LK_UNROLL
      for (int i = 0; i < kFragments; ++i) {
        const int column = rank0 + i * 8 + FragmentC::column(thread_index() % kWarp);
        if (column >= p.rank) continue;  // which is even
        store_global(reinterpret_cast<uint32_t*>(s + column),
                     Element::pack(scale * acc[i][half * 2], scale * acc[i][half * 2 + 1]));
      }
    }
  }
};

}  // namespace lk
