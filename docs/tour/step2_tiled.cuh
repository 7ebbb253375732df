// Step 2, tiled: a block computes 128 x 128 of y with tensor cores, from operands in shared memory.
//
// Step 1 read two elements for a multiply-add. Here 64 of the depth of 128 rows of x and of w, a stage, come to shared
// memory, and each element is used 128 times. ldmatrix takes them to registers as mma.sync wants them, 16 x 8 x 16 at a
// time. Three stages rotate: cp.async fills two while the third is multiplied.
//
//     stage   0      1      2      0      1          one row: 128 bytes of x or w, eight chunks of 16;
//     fill   [k=0]  [k=64] [k=128][k=192] ...        chunk c of row r lies at place c ^ (r % 8), so that the eight
//     multiply             [k=0]  [k=64] ...         rows which ldmatrix reads at once come from different banks
//
// The branch is a product like the other one, with s for x and b for w, into the same accumulators, since s is scaled
// already. The library keeps s for the backward, scales the product, and stores y in whole rows
// (csrc/kernels/store.cuh).
#pragma once

#include "problem.h"

namespace lk::tour {

constexpr int kTileN = 128, kThreads = 128, kStages = 3;  // four warps, two by two, have 64 x 64 each

// P Qᵀ for 128 rows of P and kN of Q.
template <int kN>
struct Tiled {
  using Tile = SharedTile<kDepth, sizeof(uint16_t)>;
  static constexpr int kOffsetQ = Tile::bytes(kM), kBytesStage = kOffsetQ + Tile::bytes(kN);
  static constexpr int kSharedBytes = kStages * kBytesStage, kWarpM = kM / 2, kWarpN = kN / 2;
  using Accumulator = float[kWarpM / 16][kWarpN / 8][4];

  LK_DEVICE static int lane() { return thread_index() % kWarp; }
  LK_DEVICE static int warp_row() { return thread_index() / kWarp / 2 * kWarpM; }
  LK_DEVICE static int warp_column() { return thread_index() / kWarp % 2 * kWarpN; }

  // Rows row0 on, 64 of the depth from k on: a thread copies 16 bytes of every 16th row, beyond the edges zeros.
  template <int kRows>
  LK_DEVICE static void load(uint32_t tile, const Operand& from, int row0, int k) {
    constexpr int kStep = kThreads / Tile::kChunks;
    const int row = thread_index() / Tile::kChunks, chunk = thread_index() % Tile::kChunks;
    const int depth = k + chunk * Tile::kChunkElements;
    int64_t offset = static_cast<int64_t>(row0 + row) * from.depth + depth;
    LK_UNROLL
    for (int i = 0; i < kRows; i += kStep, offset += kStep * from.depth) {
      const bool is_inside = row0 + row + i < from.rows && depth < from.depth;
      copy_async_16(tile + Tile::offset(row + i, chunk), from.data + offset, is_inside ? kChunkBytes : 0);
    }
  }

  // acc += P Qᵀ of one stage: 128 products of 16 x 8 x 16 a warp, if kN is 128.
  LK_DEVICE static void multiply(uint32_t stage, Accumulator& acc) {
    LK_UNROLL
    for (int chunk = 0; chunk < Tile::kChunks; chunk += 2) {
      uint32_t p[kWarpM / 16][4], q[kWarpN / 16][4];
      LK_UNROLL
      for (int i = 0; i < kWarpM / 16; ++i) {
        const int row = warp_row() + i * 16 + RowsFirst::row(lane());
        load_matrix_x4(p[i], stage + Tile::offset(row, chunk + RowsFirst::chunk(lane())));
      }
      LK_UNROLL
      for (int i = 0; i < kWarpN / 16; ++i) {
        const int row = warp_column() + i * 16 + ChunksFirst::row(lane());
        load_matrix_x4(q[i], stage + kOffsetQ + Tile::offset(row, chunk + ChunksFirst::chunk(lane())));
      }
      LK_UNROLL
      for (int i = 0; i < kWarpM / 16; ++i) {
        LK_UNROLL
        for (int j = 0; j < kWarpN / 8; ++j) {
          BFloat16::multiply_add(acc[i][j], p[i], q[j / 2][j % 2 * 2], q[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }

  // acc += P Qᵀ over the whole depth. Warps may still read the last stage on return.
  LK_DEVICE static void run(uint32_t smem, const Operand& p, int row0, const Operand& q, int row0_q, Accumulator& acc) {
    const int steps = ceil_div(p.depth, kDepth);
    const auto fill = [&](int t) {
      const uint32_t stage = smem + static_cast<uint32_t>(t % kStages * kBytesStage);
      if (t < steps) load<kM>(stage, p, row0, t * kDepth), load<kN>(stage + kOffsetQ, q, row0_q, t * kDepth);
      copy_async_commit();  // a group for every step, if an empty one: the wait counts groups
    };
    for (int t = 0; t < kStages - 1; ++t) fill(t);
    LK_NO_UNROLL
    for (int t = 0; t < steps; ++t) {
      copy_async_wait<kStages - 2>();
      sync_block();  // all copies of step t are here, and all warps have left the stage that is filled next
      fill(t + kStages - 1);
      multiply(smem + static_cast<uint32_t>(t % kStages * kBytesStage), acc);
    }
  }

  LK_DEVICE static void store(uint16_t* out, int rows, int columns, int row0, int column0, const Accumulator& acc,
                              float scale, const uint16_t* bias) {
    const int row = row0 + warp_row(), column = column0 + warp_column();
    store_fragments<kWarpM / 16, kWarpN / 8>(out, rows, columns, row, column, acc[0][0], scale, bias);
  }
};

LK_DEVICE void tile_of_s(const Problem& p, uint32_t smem, int row0, int column0) {
  using Product = Tiled<kRankTile>;
  Product::Accumulator acc = {};
  Product::run(smem, {p.x, p.m, p.k}, row0, {p.a, p.rank, p.k}, column0, acc);
  Product::store(p.s, p.m, p.rank, row0, column0, acc, p.scaling, nullptr);
}

LK_KERNEL(kThreads, 1) step2_s(const Problem p) {
  const int rows = ceil_div(p.m, kM);
  tile_of_s(p, dynamic_shared(), block_index() % rows * kM, block_index() / rows * kRankTile);
}

LK_KERNEL(kThreads, 1) step2_y(const Problem p) {
  using Product = Tiled<kTileN>;
  const int rows = ceil_div(p.m, kM), row0 = block_index() % rows * kM, column0 = block_index() / rows * kTileN;
  Product::Accumulator acc = {};
  Product::run(dynamic_shared(), {p.x, p.m, p.k}, row0, {p.w, p.n, p.k}, column0, acc);
  sync_block();  // the stages are free
  Product::run(dynamic_shared(), {p.s, p.m, p.rank}, row0, {p.b, p.n, p.rank}, column0, acc);
  Product::store(p.y, p.m, p.n, row0, column0, acc, 1.0f, p.bias);
}

}  // namespace lk::tour
