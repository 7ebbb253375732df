// y = x wᵀ + bias + scaling · s bᵀ, s = dropout(x) aᵀ, in one launch. Schedule "ticketed".
//
// A block draws a ticket and does one piece of work. *Shrink* tiles compute s for a block of rows; *base* tiles compute
// y. For a group of row blocks the shrink tiles have the lower tickets. A base tile multiplies x by w first and needs
// its rows of s only then; by that time they are nearly always there, and if not it waits for a flag. It waits only for
// lower tickets, which belong to blocks that are running or done: no deadlock, whatever the order the blocks start in.
#pragma once

#include "../params.h"
#include "gemm.cuh"

namespace lk {

// Counters of a launch.
constexpr int kTicketCounter = 0, kDoneCounter = 1, kFirstFlag = 2;

LK_HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// A piece of work: shrink tile or base tile number `column` of row block `row`.
struct WorkItem {
  bool is_shrink;
  int row, column;
};

// The work of a ticket. Within a group, row blocks follow each other: neighbours share columns of w, and the group's
// rows of x stay in the L2 cache.
LK_HOST_DEVICE WorkItem work_of_ticket(int ticket, int row_blocks, int shrink_columns, int base_columns,
                                       int group_rows) {
  const int per_group = group_rows * (shrink_columns + base_columns);
  const int first_row = ticket / per_group * group_rows;
  const int rows = row_blocks - first_row < group_rows ? row_blocks - first_row : group_rows;
  const int i = ticket % per_group, column = i / rows;
  const bool is_shrink = column < shrink_columns;
  return {is_shrink, first_row + i % rows, is_shrink ? column : column - shrink_columns};
}

template <class Element_, class Base_, int kRankTile, bool kAligned_>
struct LoraLinear {
  using Element = Element_;
  using Base = Base_;
  static constexpr bool kAligned = kAligned_;
  static constexpr int kThreads = Base::kThreads, kM = Base::kM;
  static constexpr int kMinBlocks = kThreads <= 128 ? 2 : 1;  // per SM: bounds the registers
  using Shrink = Gemm<kM, kRankTile, Base::kDepth, kThreads / kWarp, 1, Base::kStages>;
  using Output = SharedTile<Base::kN>;
  static constexpr int kSharedBytes = Base::kSharedBytes > Output::bytes(kM) ? Base::kSharedBytes : Output::bytes(kM);
  static_assert(Shrink::kSharedBytes <= kSharedBytes, "a rank tile is no wider than a base tile");

  LK_DEVICE static void run(const LoraLinearParams& p) {
    const uint32_t smem = dynamic_shared();
    const WorkItem work = work_of_ticket(draw_ticket(p, smem), ceil_div(p.m, kM), ceil_div(p.rank, kRankTile),
                                         ceil_div(p.n, Base::kN), p.group_rows);
    if (work.is_shrink) {
      shrink_tile(p, smem, work.row, work.column);
    } else {
      base_tile(p, smem, work.row, work.column);
    }
    leave(p);
  }

 private:
  LK_DEVICE static int draw_ticket(const LoraLinearParams& p, uint32_t smem) {
    if (thread_index() == 0) store_shared_4(smem, atomic_add(p.counters + kTicketCounter, 1));
    sync_block();
    const int ticket = static_cast<int>(load_shared_4(smem));
    sync_block();
    return ticket;
  }

  // The last block makes the counters fit for the next launch.
  LK_DEVICE static void leave(const LoraLinearParams& p) {
    if (thread_index() != 0) return;
    const uint32_t done = atomic_add_acquire_release(p.counters + kDoneCounter, 1);
    if (done + 1 != static_cast<uint32_t>(block_count())) return;
    for (int i = 0; i < kFirstFlag + ceil_div(p.m, kM); ++i) store_global(p.counters + i, 0u);
  }

  LK_DEVICE static void shrink_tile(const LoraLinearParams& p, uint32_t smem, int row_block, int column_block) {
    const int row0 = row_block * kM, column0 = column_block * kRankTile;
    const Operand x{p.x, p.x_stride, p.m, p.k}, a{p.a, p.a_stride, p.rank, p.k};
    typename Shrink::Accumulator acc = {};
    if (p.seed == nullptr) {
      Shrink::template run<Element, kAligned, false>(smem, x, row0, a, column0, acc, [](uint32_t, int) {});
    } else {
      const uint64_t seed = static_cast<uint64_t>(load_global(p.seed));
      Shrink::template run<Element, kAligned, true>(smem, x, row0, a, column0, acc, [&](uint32_t stage, int k0) {
        drop(stage, row0, k0, dropout_groups_per_row(p.k), seed, p.dropout_threshold);
      });
    }
    const float scale = p.seed == nullptr ? 1.0f : p.dropout_scale;
    sync_block();  // the stages are free
    Shrink::template stage_accumulators<Element>(smem,
                                                 [&](int mi, int ni, int i, int) { return scale * acc[mi][ni][i]; });
    sync_block();
    store_tile<kM, kRankTile, kThreads, kAligned>(smem, p.s, p.rank, p.m, p.rank, row0, column0);
    sync_block();
    if (thread_index() == 0) atomic_add_acquire_release(p.counters + kFirstFlag + row_block, 1);
  }

  // Zeroes what dropout drops in a stage of x. A chunk is one Philox group.
  LK_DEVICE static void drop(uint32_t stage, int row0, int k0, int64_t groups_per_row, uint64_t seed,
                             uint32_t threshold) {
    using Tile = typename Base::Tile;
    for (int i = thread_index(); i < kM * Tile::kChunks; i += kThreads) {
      const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
      const int64_t group = (row0 + row) * groups_per_row + k0 / kDropoutGroup + chunk;
      const PhiloxWords words = philox4x32(static_cast<uint64_t>(group), seed);
      const uint32_t address = stage + Tile::offset(row, chunk);
      Vec16 v = load_shared_16(address);
      LK_UNROLL
      for (int j = 0; j < 4; ++j) {
        const uint32_t low = dropout_bits(words, 2 * j) >= threshold ? 0x0000FFFFu : 0u;
        const uint32_t high = dropout_bits(words, 2 * j + 1) >= threshold ? 0xFFFF0000u : 0u;
        v.word[j] &= low | high;
      }
      store_shared_16(address, v);
    }
  }

  LK_DEVICE static void base_tile(const LoraLinearParams& p, uint32_t smem, int row_block, int column_block) {
    const int row0 = row_block * kM, column0 = column_block * Base::kN;
    const Operand x{p.x, p.x_stride, p.m, p.k}, w{p.w, p.w_stride, p.n, p.k};
    typename Base::Accumulator acc = {};
    Base::template run<Element, kAligned, false>(smem, x, row0, w, column0, acc, [](uint32_t, int) {});

    sync_block();  // the stages are free
    add_branch(p, smem, row_block, column0, acc);

    sync_block();
    Base::template stage_accumulators<Element>(smem, [&](int mi, int ni, int i, int column) {
      const bool has_bias = p.bias != nullptr && column0 + column < p.n;
      const float bias = has_bias ? Element::low(load_global(p.bias + column0 + column)) : 0.0f;
      return acc[mi][ni][i] + bias;
    });
    sync_block();
    store_tile<kM, Base::kN, kThreads, kAligned>(smem, p.y, p.y_stride, p.m, p.n, row0, column0);
  }

  // acc += scaling · s bᵀ, as many stages of the rank at a time as fit.
  LK_DEVICE static void add_branch(const LoraLinearParams& p, uint32_t smem, int row_block, int column0,
                                   typename Base::Accumulator& acc) {
    constexpr int kDepth = Base::kDepth, kBatch = Base::kStages * kDepth;
    const Operand s{p.s, p.rank, p.m, p.rank}, b{p.b, p.b_stride, p.n, p.rank};
    const uint32_t offset_P = Base::lane_offset_P(), offset_Q = Base::lane_offset_Q();
    LK_NO_UNROLL
    for (int batch = 0; batch < p.rank; batch += kBatch) {
      const int end = p.rank < batch + kBatch ? p.rank : batch + kBatch;
      TileLoader<Base::kN, kDepth, kThreads, kAligned> load_b(b, column0, batch);
      LK_NO_UNROLL
      for (int r = batch; r < end; r += kDepth) load_b.load(stage_of(smem, r - batch) + Base::kBytesP);
      if (batch == 0) {  // b is on its way while this waits
        if (thread_index() == 0) {
          const uint32_t* flag = p.counters + kFirstFlag + row_block;
          const uint32_t shrink_columns = ceil_div(p.rank, kRankTile);
          while (load_acquire(flag) != shrink_columns) pause();
        }
        sync_block();
      }
      TileLoader<kM, kDepth, kThreads, kAligned> load_s(s, row_block * kM, batch);
      LK_NO_UNROLL
      for (int r = batch; r < end; r += kDepth) load_s.load(stage_of(smem, r - batch));
      copy_async_commit();
      copy_async_wait<0>();
      sync_block();
      LK_NO_UNROLL
      for (int r = batch; r < end; r += 16) {
        Base::for_fragments(stage_of(smem, r - batch), offset_P, offset_Q, r % kDepth / 16,
                            [&](int mi, int ni, const uint32_t(&a)[4], uint32_t b0, uint32_t b1) {
                              // Scaled in fp32: s and b are rounded already, their product must not be.
                              float product[4] = {};
                              Element::multiply_add(product, a, b0, b1);
                              LK_UNROLL
                              for (int i = 0; i < 4; ++i) acc[mi][ni][i] += p.scaling * product[i];
                            });
      }
      if (end < p.rank) sync_block();
    }
  }

  LK_DEVICE static uint32_t stage_of(uint32_t smem, int depth) {
    return smem + depth / Base::kDepth * Base::kBytesStage;
  }
};

}  // namespace lk
