// dA = scaling · s'ᵀ dropout(x) and dB = scaling · dYᵀ s, the sums over the rows of x, in one launch.
//
// The rows are split among blocks. Each stores its sums, and the last block of a tile to arrive adds them up, in their
// order: no bit depends on who comes when. Where the launch for dX has met dY already, it has left parts of dB
// (PartOfGradB), and only their sum is wanted.
#pragma once

#include "../params/lora_linear.h"
#include "between_blocks.cuh"
#include "dropout.cuh"
#include "gemm.cuh"
#include "row_groups.cuh"
#include "store.cuh"

namespace lk {

constexpr int kGradColumns = 128;  // of A, or rows of B, in one tile
constexpr int kPartOfGradBRank = 16;

template <class Element_, int kRankTile_, Access kAccess, bool kGradYIsWhole>
struct LoraGrads {
  using Element = Element_;
  static constexpr int kRankTile = kRankTile_;
  // Rows of x, of dA; and rows of s and s', of dB.
  static constexpr bool kLongRowsAreWhole = is_base_whole(kAccess), kRanksAreWhole = is_s_whole(kAccess);
  using LongChunk = PlainChunk<Element, kLongRowsAreWhole>;
  using RankChunk = PlainChunk<Element, kRanksAreWhole>;
  using GradYChunk = PlainChunk<Element, kGradYIsWhole>;
  static constexpr int kElementBytes = sizeof(typename Element::Storage);
  static constexpr int kThreads = 128, kMinBlocks = 2, kDepth = 64 / kElementBytes, kStages = 4;
  using TileA = Gemm<Element, kRankTile, kGradColumns, kDepth, 1, 4, kStages, Layout::kColumns, Layout::kColumns>;
  using TileB = Gemm<Element, kGradColumns, kRankTile, kDepth, 4, 1, kStages, Layout::kColumns, Layout::kColumns>;
  static constexpr int kSharedBytes = larger(TileA::kSharedBytes, larger(TileA::kBytesResult, TileB::kBytesResult));
  static_assert(kPartial<TileA> == kPartial<TileB> && TileA::kSharedBytes == TileB::kSharedBytes);

  // A block's part of a tile's rows. Where there are several, `slot` is the first one's of the tile's sums. Reckoned
  // where it is asked: over a main loop, registers are scarce.
  struct Part {
    template <class Chunk>
    using Of = Chunk;  // of x, dY, s and s'
    const LoraGradsParams& p;
    int tile, split;

    LK_DEVICE static const int32_t* order() { return nullptr; }
    LK_DEVICE static NextRows rows_from(int row0) { return {row0}; }

    LK_DEVICE int first_row() const { return first_row_of(p, split); }
    LK_DEVICE int end_row() const { return first_row_of(p, split + 1); }
    LK_DEVICE int splits() const { return p.splits; }
    LK_DEVICE int64_t slot() const { return static_cast<int64_t>(tile) * p.splits; }
    LK_DEVICE int64_t counter() const { return tile; }
  };

  LK_DEVICE static void run(const LoraGradsParams& p) {
    const uint32_t smem = dynamic_shared();
    const int blocks_A = tiles_A(p) * p.splits;
    if (block_index() < blocks_A) {
      const int tile = block_index() / p.splits;
      product_A(p, smem, Part{p, tile, block_index() % p.splits}, tile % rank_blocks(p) * kRankTile,
                tile / rank_blocks(p) * kGradColumns);
    } else if (p.partial_grad_b == nullptr) {
      const int block = block_index() - blocks_A, tile = block / p.splits;
      product_B(p, smem, Part{p, blocks_A / p.splits + tile, block % p.splits}, tile / rank_blocks(p) * kGradColumns,
                tile % rank_blocks(p) * kRankTile);
    } else {
      sum_B(p, (block_index() - blocks_A) * kGradColumns);
    }
  }

  LK_DEVICE static int rank_blocks(const LoraGradsParams& p) { return ceil_div(p.rank, kRankTile); }
  LK_DEVICE static int tiles_A(const LoraGradsParams& p) {
    return p.grad_a == nullptr ? 0 : ceil_div(p.k, kGradColumns) * rank_blocks(p);
  }
  LK_DEVICE static int tiles_B(const LoraGradsParams& p) {
    return p.grad_b == nullptr ? 0 : ceil_div(p.n, kGradColumns) * rank_blocks(p);
  }

  template <class SomePart>
  LK_DEVICE static void product_A(const LoraGradsParams& p, uint32_t smem, const SomePart& part, int rank0,
                                  int column0) {
    using ChunkP = typename SomePart::template Of<RankChunk>;
    using ChunkQ = typename SomePart::template Of<LongChunk>;
    const Operand grad_s{p.grad_s, p.rank, p.rank, p.m, part.order()}, x{p.x, p.x_stride, p.k, p.m, part.order()};
    typename TileA::Accumulator acc = {};
    const auto run = [&](auto&& task) {
      TileA::template run<ChunkP, ChunkQ>(smem, grad_s, rank0, x, column0, part.first_row(), part.end_row(), acc, task);
    };
    float scale = p.scaling;
    if (p.seed != nullptr) {
      run(DropX<SomePart>{part, column0, DropoutMask(p, p.k)});
      scale *= p.dropout_scale;
    } else {
      run(NoSideTask{});
    }
    finish<TileA, kLongRowsAreWhole>(p, smem, part, acc, scale, p.grad_a, p.k, p.rank, p.k, rank0, column0);
  }

  template <class SomePart>
  LK_DEVICE static void product_B(const LoraGradsParams& p, uint32_t smem, const SomePart& part, int row0, int rank0) {
    using ChunkP = typename SomePart::template Of<GradYChunk>;
    using ChunkQ = typename SomePart::template Of<RankChunk>;
    const Operand grad_y{p.grad_y, p.grad_y_stride, p.n, p.m, part.order()}, s{p.s, p.rank, p.rank, p.m, part.order()};
    typename TileB::Accumulator acc = {};
    TileB::template run<ChunkP, ChunkQ>(smem, grad_y, row0, s, rank0, part.first_row(), part.end_row(), acc,
                                        NoSideTask{});
    finish<TileB, kRanksAreWhole>(p, smem, part, acc, p.scaling, p.grad_b, p.rank, p.n, p.rank, row0, rank0);
  }

 private:
  // While x is in shared memory.
  template <class SomePart>
  struct DropX {
    static constexpr bool kChangesStage = true;
    const SomePart& part;
    int column0;
    DropoutMask mask;

    LK_DEVICE void fill(uint32_t) const {}
    LK_DEVICE void on_stage_ready(uint32_t stage, int row0) const {
      drop_tile<typename TileA::TileQ::Tile, kDepth, kThreads>(stage + TileA::kOffsetQ, part.rows_from(row0), column0,
                                                               mask);
    }
  };

  LK_DEVICE static int first_row_of(const LoraGradsParams& p, int split) {
    const int64_t row = static_cast<int64_t>(split) * p.split_rows;
    return row < p.m ? static_cast<int>(row) : p.m;
  }

  // out[row0 ..., column0 ...] = scale · the sum of all parts.
  template <class Tile, bool kWhole, class SomePart>
  LK_DEVICE static void finish(const LoraGradsParams& p, uint32_t smem, const SomePart& part,
                               typename Tile::Accumulator& acc, float scale, void* out, int64_t stride, int rows,
                               int columns, int row0, int column0) {
    if (part.splits() > 1) {
      float* const partials = p.partials + part.slot() * kPartial<Tile>;
      store_partial<Tile>(partials + part.split * kPartial<Tile>, acc);
      if (!arrive_last(p.counters + part.counter(), part.splits(), smem)) return;
      sum_partials<Tile>(partials, part.splits(), acc);
    }
    if (kElementBytes == 2 && p.grads_are_float) {
      store_floats<Tile, kWhole>(static_cast<float*>(out), stride, rows, columns, row0, column0, acc, scale);
      return;
    }
    sync_block();  // the stages are free
    stage_accumulators<Tile>(smem, [&](int mi, int ni, int i, int) { return scale * acc[mi][ni][i]; });
    sync_block();
    store_tile<Element, Tile::kM, Tile::kN, kThreads>(smem, out, stride, rows, columns, row0, column0, kWhole);
  }

  template <class Tile, bool kWhole>
  LK_DEVICE static void store_floats(float* out, int64_t stride, int rows, int columns, int row0, int column0,
                                     const typename Tile::Accumulator& acc, float scale) {
    const int lane = thread_index() % kWarp;
    LK_UNROLL
    for (int mi = 0; mi < Tile::kFragmentsM; ++mi) {
      LK_UNROLL
      for (int ni = 0; ni < Tile::kFragmentsN; ++ni) {
        LK_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int row = row0 + Tile::warp_row() + mi * 16 + half * 8 + FragmentC::row(lane);
          const int column = column0 + Tile::warp_column() + ni * 8 + FragmentC::column(lane);
          if (row >= rows || column >= columns) continue;
          const Float2 pair = {scale * acc[mi][ni][half * 2], scale * acc[mi][ni][half * 2 + 1]};
          float* const target = out + row * stride + column;
          if constexpr (kWhole) {
            store_global(reinterpret_cast<Float2*>(target), pair);
          } else {
            store_global(target, pair.x);
            if (column + 1 < columns) store_global(target + 1, pair.y);
          }
        }
      }
    }
  }

  // dB[row0 ...] = scaling · the sum over the blocks of rows of [n, kPartOfGradBRank].
  LK_DEVICE static void sum_B(const LoraGradsParams& p, int row0) {
    constexpr int kGroups = kPartOfGradBRank / 4;
    const float scale = p.scaling;
    for (int i = thread_index(); i < kGradColumns * kGroups; i += kThreads) {
      const int row = row0 + i / kGroups, column = i % kGroups * 4;
      if (row >= p.n || column >= p.rank) continue;
      float sum[4] = {};
      for (int part = 0; part < p.parts_of_grad_b; ++part) {
        const int64_t first = (static_cast<int64_t>(part) * p.n + row) * kPartOfGradBRank + column;
        const Vec16 v = load_global(reinterpret_cast<const Vec16*>(p.partial_grad_b + first));
        LK_UNROLL
        for (int j = 0; j < 4; ++j) sum[j] += float_of(v.word[j]);
      }
      LK_UNROLL
      for (int j = 0; j < 4; ++j) sum[j] *= scale;
      store_four(p, static_cast<int64_t>(row) * p.rank + column, sum, p.rank - column);
    }
  }

  // Elements [first, first + 4) of dB, of which `valid` exist; of whole rows, all.
  LK_DEVICE static void store_four(const LoraGradsParams& p, int64_t first, const float (&f)[4], int valid) {
    float* const floats = static_cast<float*>(p.grad_b) + first;
    if (kElementBytes == 4 || p.grads_are_float) {
      if constexpr (kRanksAreWhole) {
        store_global(reinterpret_cast<Vec16*>(floats), vec16_of(f));
      } else {
        LK_UNROLL
        for (int j = 0; j < 4; ++j) {
          if (j < valid) store_global(floats + j, f[j]);
        }
      }
    } else if constexpr (kElementBytes == 2) {
      uint16_t* const halves = static_cast<uint16_t*>(p.grad_b) + first;
      if constexpr (kRanksAreWhole) {
        const Float2 both = {float_of(Element::pack(f[0], f[1])), float_of(Element::pack(f[2], f[3]))};
        store_global(reinterpret_cast<Float2*>(halves), both);
      } else {
        LK_UNROLL
        for (int j = 0; j < 4; ++j) {
          if (j < valid) store_global(halves + j, static_cast<uint16_t>(Element::pack(f[j], 0.0f)));
        }
      }
    }
  }
};

// What GroupedLoraGrads asks of the rows of groups: how they are found, and what a group's gradients are made with.
//
// They lie group by group, and all groups use all ranks.
struct RowsInPlace {
  using Params = GroupedLoraGradsParams;
  static constexpr bool kRanksDiffer = false;
  template <class Chunk>
  using Of = Chunk;

  LK_DEVICE static const int32_t* order(const Params&) { return nullptr; }
  LK_DEVICE static NextRows rows_from(const int32_t*, int first, int) { return {first}; }
  LK_DEVICE static int rank_of(const Params& p, int) { return p.lora.rank; }
  LK_DEVICE static float scaling_of(const Params& p, int) { return p.lora.scaling; }
};

// The same of every group. A group's rows are cut into parts as blocks of rows are numbered (row_groups.cuh); one
// without rows has a part, too, whose sums are zero. Groups of several parts, that is of more than split_rows rows,
// begin in slots 2 / split_rows of their first row apart: at least as many as they have parts.
template <class Grads, class Rows = RowsInPlace>
struct GroupedLoraGrads {
  static constexpr int kThreads = Grads::kThreads, kMinBlocks = Grads::kMinBlocks;
  static constexpr int kSharedBytes = Grads::kSharedBytes + kBytesGroupRows;

  struct Part {
    template <class Chunk>
    using Of = typename Rows::template Of<Chunk>;
    int first, end, split, split_count;
    int64_t first_slot;
    const int32_t* all_rows;

    LK_DEVICE const int32_t* order() const { return all_rows; }
    LK_DEVICE auto rows_from(int row0) const { return Rows::rows_from(all_rows, row0, end); }
    LK_DEVICE int first_row() const { return first; }
    LK_DEVICE int end_row() const { return end; }
    LK_DEVICE int splits() const { return split_count; }
    LK_DEVICE int64_t slot() const { return first_slot; }
    LK_DEVICE int64_t counter() const { return first_slot; }
  };

  LK_DEVICE static void run(const typename Rows::Params& p) {
    const LoraGradsParams& all = p.lora;
    const int tiles_A = Grads::tiles_A(all), tiles = tiles_A + Grads::tiles_B(all);
    const int tile = block_index() % tiles, rows = all.split_rows;
    const uint32_t smem = dynamic_shared();
    const GroupRows group =
        find_group_rows<true>(p.groups, all.m, block_index() / tiles, rows, smem + Grads::kSharedBytes);
    const int splits = larger(ceil_div(group.end - group.group_first, rows), 1);
    const int split = (group.first - group.group_first) / rows;
    if (split >= splits) return;
    const int64_t slot = tile * slots_of_parts(all.m, rows) + slots_of_parts(group.group_first, rows);
    Part part = {group.first, smaller(group.first + rows, group.end), split, splits, slot, Rows::order(p)};
    const int rank_blocks = Grads::rank_blocks(all), tile_B = tile - tiles_A;
    const bool is_A = tile < tiles_A;
    const int rank0 = (is_A ? tile : tile_B) % rank_blocks * Grads::kRankTile;
    // Of ranks that the group does not use, zeros.
    if (Rows::kRanksDiffer && Rows::rank_of(p, group.group) <= rank0) part.end = part.first;
    LoraGradsParams one = all;
    one.scaling = Rows::scaling_of(p, group.group);
    const int64_t bytes = all.grads_are_float ? 4 : Grads::kElementBytes;
    if (is_A) {
      one.grad_a = static_cast<char*>(one.grad_a) + group.group * bytes * all.rank * all.k;
      Grads::product_A(one, smem, part, rank0, tile / rank_blocks * kGradColumns);
    } else {
      one.grad_b = static_cast<char*>(one.grad_b) + group.group * bytes * all.rank * all.n;
      Grads::product_B(one, smem, part, tile_B / rank_blocks * kGradColumns, rank0);
    }
  }
};

}  // namespace lk
