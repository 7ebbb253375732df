// Step 5, warp-specialised: who loads only loads, who multiplies only multiplies, by wgmma (sm_90a).
//
// In step 4 the thread that fills the ring also multiplies: it waits until the slowest warp has left a stage, and its
// own warp waits with it. A block ends with its tile, and the next one's ring begins empty. And mma.sync takes its
// operands from registers, by way of 32 ldmatrix a stage, and each product of 16 x 8 x 16 is an instruction that a warp
// issues.
//
//     warpgroup 0   one thread     draws tickets, fills the ring: also with the next tile, while this one is stored
//     warpgroup 1   128 threads    rows 0 to 63 of the tile       4 products of 64 x 256 x 16 per stage, with operands
//     warpgroup 2   128 threads    rows 64 to 127                 from shared memory, which run while the warps go on
//
// - A block stays on its SM until no tickets are left. Its ring goes on from tile to tile.
// - Who multiplies learns the ticket from the stage: it lies beside it, under the same barriers.
// - A tile is 256 wide, 128 accumulators a thread: who loads leaves registers to who multiplies, 40 and 232.
// - A stage is given back when the products of the next one are issued: the tensor cores do not wait for that.
//
// The library (csrc/kernels/lora_linear_wgmma.cuh) has s computed by idle warps, with dropout, and unscaled for the
// backward; it multiplies no more than the ranks, and stores y by the copy engine.
#pragma once

#include "step4_tma_ring.cuh"

namespace lk::tour {

struct Specialised {
  static constexpr int kWideN = 256, kGroups = 2, kGroupRows = kM / kGroups, kThreads = (1 + kGroups) * kWarpgroup;
  static constexpr int kRowBytes = kDepth * 2, kOffsetQ = kM * kRowBytes, kBytesStage = kOffsetQ + kWideN * kRowBytes;
  static constexpr int kOffsetRing = kRing * kBytesStage, kOffsetTickets = kOffsetRing + Ring<kRing>::kBytes;
  static constexpr int kSharedBytes = kOffsetTickets + kRing * 4;

  const Problem& p;
  const Maps& maps;
  uint32_t smem = dynamic_shared();
  Ring<kRing> ring{smem + kOffsetRing};
  int depths = ceil_div(p.k, kDepth), tickets = tiles_of_s(p) + ceil_div(p.m, kM) * ceil_div(p.n, kWideN);
  bool leads = thread_index() % kWarp == 0;  // its warp

  LK_DEVICE int steps(const Work& work) const { return depths + (work.is_s ? 0 : ceil_div(p.rank, kDepth)); }
  LK_DEVICE uint32_t stage() const { return smem + ring.stage() * kBytesStage; }
  LK_DEVICE uint32_t ticket() const { return smem + kOffsetTickets + ring.stage() * 4; }

  LK_DEVICE void load() {
    for (int drawn = draw_ticket(p); drawn < tickets; drawn = draw_ticket(p)) {
      const Work work = work_of(p, drawn);
      LK_NO_UNROLL
      for (int t = 0; t < steps(work); ++t, ++ring.passed) {
        ring.wait_empty();
        if (t == 0) store_shared_4(ticket(), static_cast<uint32_t>(drawn));
        barrier_arrive_expecting(ring.full(), work.is_s ? kOffsetQ + kRankTile * kRowBytes : kBytesStage);
        const bool is_branch = t >= depths;
        const int k = (is_branch ? t - depths : t) * kDepth, column = work.column * (work.is_s ? kRankTile : kWideN);
        load_box(stage() + kOffsetQ, work.is_s ? &maps.a : is_branch ? &maps.b : &maps.w, k, column, ring.full());
        if (t == depths) wait_for_s(p, work.row), fence_proxy_async();
        load_box(stage(), is_branch ? &maps.s : &maps.x, k, work.row * kM, ring.full());
      }
    }
    ring.wait_empty();
    store_shared_4(ticket(), static_cast<uint32_t>(tickets));  // there are no more
    barrier_arrive(ring.full());
  }

  // This group's 64 rows of a tile: out = scale · (the products of its stages) + bias.
  template <int kN>
  LK_DEVICE void tile(const Work& work, int group, uint16_t* out, int columns, float scale, const uint16_t* bias) {
    float acc[kN / 2] = {};
    uint32_t before = 0;
    LK_NO_UNROLL
    for (int t = 0; t < steps(work); ++t, ++ring.passed) {
      ring.wait_full();
      const uint64_t rows = matrix_descriptor(stage() + static_cast<uint32_t>(group * kGroupRows * kRowBytes), 0, 1024);
      const uint64_t others = matrix_descriptor(stage() + kOffsetQ, 0, 1024);
      multiply_fence();
      LK_UNROLL
      for (int i = 0; i < kDepth * 2; i += 32) {  // bytes: 16 of the depth
        Warpgroup<BFloat16>::multiply_add_async<false>(acc, rows + i / 16, others + i / 16, true);
      }
      multiply_commit();
      multiply_wait<1>();  // all but these
      if (t > 0 && leads) barrier_arrive(before);
      before = ring.empty();
    }
    multiply_wait<0>(acc);
    if (leads) barrier_arrive(before);
    const int row = work.row * kM + group * kGroupRows + thread_index() % kWarpgroup / kWarp * 16;
    store_fragments<1, kN / 8>(out, p.m, columns, row, work.column * kN, acc, scale, bias);
  }

  LK_DEVICE void multiply(int group) {
    for (;;) {
      ring.wait_full();
      const int drawn = static_cast<int>(broadcast(leads ? load_shared_4(ticket()) : 0));
      if (drawn >= tickets) return;
      const Work work = work_of(p, drawn);
      if (work.is_s) {
        tile<kRankTile>(work, group, p.s, p.rank, p.scaling, nullptr);
        fence_proxy_async();  // the engine reads s
        sync_named(1, kGroups * kWarpgroup);
        if (thread_index() == kWarpgroup) tell_s(p, work.row);
      } else {
        tile<kWideN>(work, group, p.y, p.n, 1.0f, p.bias);
      }
    }
  }
};

LK_KERNEL(Specialised::kThreads, 1) step5(const Problem p, const LK_GRID_CONSTANT Maps maps) {
  Specialised block{p, maps};
  if (thread_index() == 0) block.ring.init(Specialised::kGroups * kWarpgroup / kWarp);
  sync_block();
  const int warp = static_cast<int>(broadcast(static_cast<uint32_t>(thread_index() / kWarp)));
  if (warp < kWarpgroup / kWarp) {
    release_registers<40>();
    if (thread_index() == 0) block.load();
  } else {
    claim_registers<232>();
    block.multiply(warp / (kWarpgroup / kWarp) - 1);
  }
}

}  // namespace lk::tour
