// y = x wT + bias + scaling · s bT, s = dropout(x) aT, on sm_90a: schedule "wgmma". And the gradient of x,
// dX = dY W + scaling · mask ∘ (s' A), s' = dY B: x is dY, and w, a and b, which are W, B and A, lie the other way
// round in memory.
//
// A block stays on its SM and has three warpgroups, each with a part of its own.
// - Warp 0 loads: one thread draws tickets of tiles of y, tells them to the other warps, and lets the copy engine fill
//   a ring of stages with x and w, and behind these with s and b: the branch is one more stage per 64 ranks.
// - Warps 1 to 3 would be idle. In the forward they compute s in slabs of 16 rows (shrink_slabs.cuh), dropout included,
//   in issue slots that the products leave free; a flag per block of rows tells when its s is there. In the gradient of
//   x they make the mask of a tile's branch, a bit per element. Before that they round adapters that are fp32
//   (rounded_adapters.cuh).
// - Warpgroups 1 and 2 multiply 64 rows of the tile each, add the branch in fp32, and store by the copy engine, while
//   the ring fills with the next tile. In the gradient of x, which drops nothing on the way to s', they also compute
//   that, in tiles of its own, and parts of dB while they have dY (grad_s_tile.cuh).
//
// A forward may run in clusters of two blocks, which take tiles of the same columns of y, one block of rows below the
// other: w and b come from memory once for both (WgmmaLoop). One of them draws tickets of such pairs, and tells the
// other. Where the last pair has one block of rows, the other one works on zeros, of which nothing is stored.
//
// No deadlock, whatever the order the blocks start in. In the forward a tile waits for slabs alone, and whoever waits
// has warps that go on drawing slabs until none are left. In the gradient of x it waits for tiles of lower tickets,
// which belong to blocks that are running or done.
#pragma once

#include "../params/lora_linear_wgmma.h"
#include "cluster_tickets.cuh"
#include "gemm_wgmma.cuh"
#include "grad_s_tile.cuh"
#include "rounded_adapters.cuh"
#include "shrink_slabs.cuh"
#include "store_boxes.cuh"
#include "told_work.cuh"

namespace lk {

// kRankTile: columns of s that a warp computes at a time; of the gradient of x, whether there are more than 16 ranks.
// kCluster_: blocks of a cluster.
template <class Element_, int kN_, int kRankTile_, bool kGradX = false, int kCluster_ = 1>
struct LoraLinearWgmma {
  using Element = Element_;
  using Params = LoraWgmmaParams;
  static constexpr int kCluster = kCluster_;
  static_assert(kCluster == 1 || (kCluster == 2 && !kGradX));
  using Loop = WgmmaLoop<Element, kN_, kGradX, kCluster>;
  static constexpr int kM = Loop::kM, kN = kN_, kDepth = Loop::kDepth, kStages = Loop::kStages;
  static constexpr int kRankTile = kRankTile_, kThreads = (1 + Loop::kGroups) * kWarpgroup;

  // Shared memory: stages, staging tiles of y (one in the place of two, where there is a mask), the mask, told work,
  // barriers, a cluster's ticket.
  static constexpr bool kIsClustered = Loop::kIsClustered;
  using Store = StoreBoxes<Loop, kGradX ? 1 : 2>;
  // The mask is made and kept by 128 columns: eight rows of one, which a warp reads together, lie in different banks.
  static constexpr int kKeepColumns = 128;
  using Keep = KeepBits<kM, kKeepColumns>;
  static constexpr int kOffsetStore = Loop::kBytesStages, kOffsetKeep = kOffsetStore + Store::kBytes;
  static constexpr int kOffsetWork = kOffsetKeep + (kGradX ? kN / kKeepColumns * Keep::kBytes : 0);
  static constexpr int kOffsetStageBarriers = kOffsetWork + ToldWork::kBytes;
  static constexpr int kOffsetKeepBarriers = kOffsetStageBarriers + Loop::kBytesBarriers;
  static constexpr int kOffsetSavedBarrier = kOffsetKeepBarriers + (kGradX ? RingBarriers<1>::kBytes : 0);
  static constexpr int kOffsetTickets = kOffsetSavedBarrier + (kGradX ? kBytesBarrier : 0);
  static constexpr int kSharedBytes = kOffsetTickets + (kIsClustered ? ClusterTickets::kBytes : 0);

  // Of the registers that the launch gives to every thread, who loads leaves most to who multiplies.
  static constexpr int kLaunchRegisters = 168;
  static constexpr int kLoaderRegisters = kGradX ? 56 : kRankTile == 16 ? 80 : 104;
  static constexpr int kProductRegisters = kGradX ? 224 : kRankTile == 16 ? 208 : 200;
  static_assert(kLoaderRegisters + Loop::kGroups * kProductRegisters <= (1 + Loop::kGroups) * kLaunchRegisters);

  LK_DEVICE static void run(const Params& p) {
    const uint32_t smem = dynamic_shared();
    if (thread_index() == 0) {
      Loop::init(smem + kOffsetStageBarriers);
      ToldWork::init(smem + kOffsetWork, kProductWarps + (kGradX ? kSideWarps : 0));
      if constexpr (kGradX) {
        RingBarriers<1>::init(smem + kOffsetKeepBarriers, kSideWarps, kProductWarps);
        barrier_init(smem + kOffsetSavedBarrier, 1);
      }
      if constexpr (kIsClustered) ClusterTickets::init(smem + kOffsetTickets);
      barrier_init_done();
    }
    if constexpr (kIsClustered) {
      sync_cluster();
    } else {
      sync_block();
    }
    const int warp = static_cast<int>(broadcast(static_cast<uint32_t>(thread_index() / kWarp)));
    if (warp <= kSideWarps) {
      release_registers<kLoaderRegisters>();
      if (warp == 0) {
        if (lane() == 0) load_tiles(p, smem);
      } else {
        const Adapters adapters = adapters_of(p);
        adapters.make();
        if constexpr (kGradX) {
          make_masks(p.lora, smem);
        } else {
          adapters.wait();
          Slabs::run(p.lora);
        }
      }
    } else {
      claim_registers<kProductRegisters>();
      compute_tiles(p, smem, warp / (kWarpgroup / kWarp) - 1);
    }
    if constexpr (kIsClustered) {
      sync_warp();     // its lanes may have had parts of their own
      sync_cluster();  // nobody arrives at barriers of a block that has ended
    }
  }

 private:
  static constexpr int kSideWarps = kWarpgroup / kWarp - 1, kProductWarps = Loop::kProductWarps;
  using Adapters = RoundedAdapters<Element>;
  using Slabs = ShrinkSlabs<Element, kRankTile, kM>;
  static constexpr int kColumnsOfGradS = kRankTile == 16 ? 16 : 64;
  using GradS = GradSTile<Element, kColumnsOfGradS>;
  static_assert(!GradS::kHasParts || GradS::kBytesSavedS <= Store::kBytesTile);
  using Product = typename Loop::Product;
  using Accumulator = typename Loop::Accumulator;

  LK_DEVICE static int lane() { return thread_index() % kWarp; }

  LK_DEVICE static Adapters adapters_of(const Params& p) { return Adapters(p, ceil_div(p.lora.m, kM)); }

  LK_DEVICE static Loop loop_of(uint32_t smem) { return Loop(smem, smem + kOffsetStageBarriers); }

  // ---------------------------------------------------------------------------------------------- the one who loads

  // Of tiles; in a cluster, of as many at a time as it has blocks, one below the other.
  class Tickets {
   public:
    LK_DEVICE Tickets(const LoraLinearParams& p, uint32_t smem)
        : p_(p), of_cluster_(smem + kOffsetTickets, p.counters) {}

    LK_DEVICE int next() {
      if constexpr (kIsClustered) return of_cluster_.next();
      return static_cast<int>(atomic_add(p_.counters + kTicketCounter, 1));
    }

    // This block's.
    LK_DEVICE static WorkItem work_of(int ticket, int row_blocks, int shrink_columns, int columns, int group_rows) {
      WorkItem work = work_of_ticket(ticket, row_blocks, shrink_columns, columns, group_rows);
      if constexpr (kIsClustered) work.row = work.row * kCluster + static_cast<int>(cluster_rank());
      return work;
    }

   private:
    const LoraLinearParams& p_;
    ClusterTickets of_cluster_;
  };

  LK_DEVICE static void load_tiles(const Params& p, uint32_t smem) {
    const LoraLinearParams& lora = p.lora;
    const int row_blocks = ceil_div(lora.m, kM * kCluster), columns = ceil_div(lora.n, kN),
              depths = ceil_div(lora.k, kDepth);
    const int shrink_columns = kGradX ? ceil_div(lora.rank, kColumnsOfGradS) : 0;
    const Adapters adapters = adapters_of(p);
    for (const TensorMap* map : {&p.x, &p.w, &p.s, &p.b, &p.y}) prefetch_map(map);
    Loop loop = loop_of(smem);
    ToldWork told(smem + kOffsetWork);
    Tickets tickets(lora, smem);
    int ticket = tickets.next();
    LK_NO_UNROLL
    while (ticket < row_blocks * (shrink_columns + columns)) {
      const WorkItem work = Tickets::work_of(ticket, row_blocks, shrink_columns, columns, lora.group_rows);
      told.tell(work);
      const bool is_shrink = kGradX && work.is_shrink;
      if (is_shrink) adapters.wait();
      LK_NO_UNROLL
      for (int t = 0; t < depths; ++t) {
        if (t == depths - 1) ticket = tickets.next();  // its way is hidden behind a full ring
        loop.fill_stage(is_shrink ? Loop::kOffsetW + GradS::kBytesFactor : Loop::kBytesStage,
                        [&](uint32_t stage, uint32_t barrier) {
                          load_box(stage, &p.x, t * kDepth, work.row * kM, barrier);
                          if (is_shrink) {
                            load_box(stage + Loop::kOffsetW, &p.a, work.column * kColumnsOfGradS, t * kDepth, barrier);
                          } else {
                            Loop::load_columns(stage, &p.w, t * kDepth, work.column * kN, barrier);
                          }
                        });
      }
      if (is_shrink) continue;
      LK_NO_UNROLL
      for (int r = 0; r < lora.rank; r += kDepth) {
        loop.fill_stage(Loop::kBytesStage, [&](uint32_t stage, uint32_t barrier) {
          if (r == 0) adapters.wait();
          Loop::load_columns(stage, &p.b, r, work.column * kN, barrier);
          if (r == 0) wait_for_s(lora, work.row);  // while b is on its way
          load_box(stage, &p.s, r, work.row * kM, barrier);
        });
      }
    }
    told.tell_end();
  }

  LK_DEVICE static void wait_for_s(const LoraLinearParams& p, int row) {
    if (kIsClustered && row * kM >= p.m) return;  // rows that are not there have no flag
    const uint32_t expected =
        kGradX ? static_cast<uint32_t>(GradS::kArrivals * ceil_div(p.rank, kColumnsOfGradS)) : Slabs::expected(p, row);
    while (load_acquire(p.counters + kFirstFlag + row) != expected) pause();
    fence_proxy_async();  // s was stored by threads, and the copy engine reads it
  }

  // ------------------------------------------------------------------------------------------ those who make masks

  using KeepSlot = Ring<1>;

  LK_DEVICE static void make_masks(const LoraLinearParams& p, uint32_t smem) {
    const uint32_t barriers = smem + kOffsetKeepBarriers;
    ToldWork told(smem + kOffsetWork);
    WorkItem work;
    KeepSlot keep;
    while (told.next(work)) {
      if (work.is_shrink || p.seed == nullptr) continue;
      barrier_wait(RingBarriers<1>::empty(barriers, 0), keep.empty_parity());
      LK_NO_UNROLL
      for (int i = 0; i < kN / kKeepColumns; ++i) {
        Keep::template compute<kSideWarps * kWarp>(smem + kOffsetKeep + i * Keep::kBytes, NextRows{work.row * kM},
                                                   work.column * kN + i * kKeepColumns, DropoutMask(p, p.n),
                                                   thread_index() - kWarp);
      }
      sync_warp();
      if (lane() == 0) barrier_arrive(RingBarriers<1>::full(barriers, 0));
      keep.advance();
    }
  }

  // -------------------------------------------------------------------------------------------- those who multiply

  LK_DEVICE static void compute_tiles(const Params& p, uint32_t smem, int group) {
    Loop loop = loop_of(smem);
    ToldWork told(smem + kOffsetWork);
    WorkItem work;
    KeepSlot keep;
    GradS grad_s(p, smem + kOffsetStore, smem + kOffsetSavedBarrier);
    while (told.next(work)) {
      if constexpr (kGradX) {
        if (work.is_shrink) {
          grad_s.compute(work, group, loop);
          continue;
        }
      }
      Accumulator acc;
      LK_UNROLL
      for (int i = 0; i < kN / 2; ++i) acc[i] = 0.0f;
      loop.multiply(p.lora.k, group, acc);
      add_branch(p.lora, smem, group, loop, keep, acc);
      Store::store(p, smem + kOffsetStore, group, work.row, work.column, acc);
    }
    Store::wait();
  }

  static constexpr int kFragmentDepth = Loop::kFragmentDepth;
  // Columns of the branch's product at a time: what two products leave registers for, or a panel.
  static constexpr int kChunk = kGradX ? Loop::kPanelColumns : 32;
  static constexpr int kNextChunk = (kGradX ? Loop::kBytesPanel : kChunk * Loop::kRowBytes) / 16;

  // acc += scaling · s bT, the sum in fp32: the product of one chunk of columns is formed while another one is added.
  LK_DEVICE static void add_branch(const LoraLinearParams& p, uint32_t smem, int group, Loop& loop, KeepSlot& keep,
                                   Accumulator& acc) {
    const bool is_masked = kGradX && p.seed != nullptr;
    const float scale = is_masked ? p.scaling * p.dropout_scale : p.scaling;
    if (is_masked) barrier_wait(RingBarriers<1>::full(smem + kOffsetKeepBarriers, 0), keep.full_parity());
    LK_NO_UNROLL
    for (int r = 0; r < p.rank; r += kDepth) {
      loop.use_stage([&](uint32_t stage) {
        const uint64_t s = Loop::rows_of(stage, group), b = Loop::columns_of(stage);
        float product[2][kChunk / 2];
        const auto issue = [&](int chunk) {
          multiply_fence();
          if constexpr (kRankTile == kFragmentDepth) {
            Product::template multiply_add_async<kGradX>(product[chunk % 2], s, b + chunk * kNextChunk, false);
          } else {
            // Unrolled, it would take registers that are not there.
            LK_NO_UNROLL
            for (int i = 0; i < ceil_div(smaller(kDepth, p.rank - r), kFragmentDepth); ++i) {
              Product::template multiply_add_async<kGradX>(product[chunk % 2], s + i * Loop::kNextRows,
                                                           b + chunk * kNextChunk + i * Loop::kNextColumns, i > 0);
            }
          }
          multiply_commit();
        };
        issue(0);
        LK_UNROLL
        for (int chunk = 0; chunk < kN / kChunk; ++chunk) {
          if (chunk + 1 < kN / kChunk) {
            issue(chunk + 1);
            multiply_wait<1>(product[chunk % 2]);
          } else {
            multiply_wait<0>(product[chunk % 2]);
          }
          float* const sums = acc + chunk * kChunk / 2;
          if constexpr (kGradX) {
            add_kept(smem, group, chunk, is_masked, scale, product[chunk % 2], sums);
          } else {
            LK_UNROLL
            for (int i = 0; i < kChunk / 2; ++i) sums[i] += scale * product[chunk % 2][i];
          }
        }
      });
    }
    if (is_masked) {
      sync_warp();
      if (lane() == 0) barrier_arrive(RingBarriers<1>::empty(smem + kOffsetKeepBarriers, 0));
      keep.advance();
    }
  }

  // Of a chunk of columns, what the mask keeps.
  LK_DEVICE static void add_kept(uint32_t smem, int group, int chunk, bool is_masked, float scale,
                                 const float (&product)[kChunk / 2], float* sums) {
    const int row = group * Loop::kGroupRows + thread_index() % kWarpgroup / kWarp * 16 + FragmentC::row(lane());
    LK_UNROLL
    for (int half = 0; half < 2; ++half) {
      LK_UNROLL
      for (int word = 0; word < kChunk / 32; ++word) {
        uint32_t bits = ~0u;
        const int column = chunk * kChunk + word * 32;
        const uint32_t keep = smem + kOffsetKeep + column / kKeepColumns * Keep::kBytes;
        if (is_masked) bits = Keep::word(keep, row + half * 8, column % kKeepColumns);
        bits >>= FragmentC::column(lane());
        LK_UNROLL
        for (int j = 0; j < 8; ++j) {
          const int i = (word * 4 + j / 2) * 4 + half * 2 + j % 2;
          if (bits >> (j / 2 * 8 + j % 2) & 1) sums[i] += scale * product[i];
        }
      }
    }
  }
};

}  // namespace lk
