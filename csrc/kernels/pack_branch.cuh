// acc += Σ scaling · s bᵀ over the members of a pack whose y is one for all, with s of other blocks.
//
// As many ranks at a time as the stages hold, s where a stage has P and b where it has Q, as in LoraBranch. Members'
// ranks lie one behind the other, each from where a fragment of the depth begins: short ranks share a stage, and are
// brought and waited for together.
#pragma once

#include "../params/lora_pack.h"
#include "lora_branch.cuh"

namespace lk {

template <class Base, class BranchSide, int kRankTile>
class PackBranch {
  using Element = typename Base::Element;
  using Branch = LoraBranch<Base, Access::kWhole>;
  static constexpr int kFragment = Base::kFragmentDepth, kDepth = Base::kDepth, kThreads = Base::kThreads;
  static_assert(Base::kFactors == Layout::kColumns, "b lies as w does, a rank in a row of memory");

 public:
  // flags: one behind the other, of members, whose s is there when a flag has the number of its tiles. `side` is memory
  // for BranchSide.
  LK_DEVICE static void add(const LoraPackParams& p, uint32_t smem, uint32_t side, const uint32_t* flags, int row0,
                            int column0, typename Base::Accumulator& acc) {
    int ranks = 0;
    LK_UNROLL
    for (const LoraLinearParams& member : p.members) ranks += padded(member.rank);  // 0 where there is none
    LK_NO_UNROLL
    for (int begin = 0; begin < ranks; begin += Branch::kBatch) {
      const int depth = smaller(ranks - begin, Branch::kBatch);
      load_b(p, smem, column0, begin, depth);
      if (begin == 0) wait_for_s(p, flags);  // b is on its way
      LK_NO_UNROLL
      for (int d = 0; d < depth; d += kDepth) load_s(p, Branch::stage_of(smem, d), row0, begin + d);
      copy_async_commit();
      copy_async_wait<0>();
      sync_block();
      multiply(p, smem, side, row0, column0, begin, depth, acc);
      if (begin + depth < ranks) sync_block();
    }
  }

 private:
  LK_DEVICE static int padded(int rank) { return (rank + kFragment - 1) & -kFragment; }

  // Which member's a place is, for places that follow each other.
  class Finder {
   public:
    int member = 0, begin = 0;  // and where its places do

    LK_DEVICE explicit Finder(const LoraPackParams& p) : end_(padded(p.members[0].rank)) {}

    LK_DEVICE void find(const LoraPackParams& p, int place) {
      LK_NO_UNROLL
      while (place >= end_) {
        begin = end_;
        end_ += padded(p.members[++member].rank);
      }
    }

   private:
    int end_;
  };

  // Each fragment's ranks are rows of the tile.
  LK_DEVICE static void load_b(const LoraPackParams& p, uint32_t smem, int column0, int begin, int depth) {
    Finder finder(p);
    LK_NO_UNROLL
    for (int d = 0; d < depth; d += kFragment) {
      finder.find(p, begin + d);
      const LoraLinearParams& q = p.members[finder.member];
      with_adapter_chunk<Element, true>(q.adapters_are_float, [&](auto chunk) {
        TileLoader<Element, Base::kN, kFragment, Layout::kColumns, kThreads, decltype(chunk)> load(
            {q.b, q.b_stride, q.n, q.rank}, column0, begin + d - finder.begin);
        load.load(Branch::stage_of(smem, d) + Base::kOffsetQ + d % kDepth * Base::TileQ::Tile::kRowBytes);
      });
    }
  }

  // kDepth of the ranks from `place` on, of which this thread has a column of chunks.
  LK_DEVICE static void load_s(const LoraPackParams& p, uint32_t stage, int row0, int place) {
    constexpr int kChunks = Base::TileP::Tile::kChunks, kElements = Base::TileP::Tile::kChunkElements;
    const int column = thread_index() % kChunks * kElements;
    int member = 0, begin = 0, end = 0;
    LK_UNROLL
    for (int i = 1; i < kMaxMembers; ++i) {
      end += padded(p.members[i - 1].rank);
      if (place + column >= end) member = i, begin = end;
    }
    const LoraLinearParams& q = p.members[smaller(member, p.count - 1)];  // behind all ranks, nobody multiplies
    typename Base::template LoaderP<InParts<AsyncChunk<Element>>> load({q.s, q.rank, q.m, q.rank}, row0, place - begin);
    load.load(stage);
  }

  LK_DEVICE static void wait_for_s(const LoraPackParams& p, const uint32_t* flags) {
    if (thread_index() == 0) {
      for (int i = 0; i < p.count; ++i) {
        const uint32_t tiles = static_cast<uint32_t>(ceil_div(p.members[i].rank, kRankTile));
        while (load_acquire(flags + i) != tiles) pause();
      }
    }
    sync_block();
  }

  LK_DEVICE static void multiply(const LoraPackParams& p, uint32_t smem, uint32_t side, int row0, int column0,
                                 int begin, int depth, typename Base::Accumulator& acc) {
    const uint32_t offset_P = Base::lane_offset_P(), offset_Q = Base::lane_offset_Q();
    Finder finder(p);
    int masked = -1;
    LK_NO_UNROLL
    for (int d = 0; d < depth; d += kFragment) {
      finder.find(p, begin + d);
      const LoraLinearParams& q = p.members[finder.member];
      const auto add = [&](auto sum) {
        Base::for_fragments(Branch::stage_of(smem, d), offset_P, offset_Q, d % kDepth / kFragment,
                            [&](int mi, int ni, const uint32_t(&a)[4], uint32_t b0, uint32_t b1) {
                              float product[4] = {};
                              Element::multiply_add(product, a, b0, b1);
                              sum.add(acc[mi][ni], product, mi, ni);
                            });
      };
      if (q.seed == nullptr) {
        add(ScaledSum{in_register(q.scaling)});
        continue;
      }
      if (finder.member != masked) {  // its bits take the place of another member's
        sync_block();
        BranchSide::Keep::template compute<kThreads>(side, NextRows{row0}, column0, DropoutMask(q, q.n));
        sync_block();
        masked = finder.member;
      }
      add(MaskedSum<Base>{q.scaling * q.dropout_scale, side});
    }
  }
};

}  // namespace lk
