// y = x wT + bias with the main loop of lora_linear's kernels for sm_90a and without a branch. A yardstick of the
// tests, as frozen_linear.cuh is.
#pragma once

#include "gemm_wgmma.cuh"
#include "store_boxes.cuh"
#include "told_work.cuh"

namespace lk {

template <class Loop_>
struct FrozenLinearWgmma {
  using Params = LoraWgmmaParams;
  using Loop = Loop_;
  using Store = StoreBoxes<Loop, 2>;
  static constexpr int kThreads = (1 + Loop::kGroups) * kWarpgroup;
  static constexpr int kOffsetWork = Loop::kBytesStages + Store::kBytes;
  static constexpr int kOffsetBarriers = kOffsetWork + ToldWork::kBytes;
  static constexpr int kSharedBytes = kOffsetBarriers + Loop::kBytesBarriers;
  static constexpr int kLoaderRegisters = 40, kProductRegisters = 232;

  LK_DEVICE static void run(const Params& p) {
    const uint32_t smem = dynamic_shared();
    if (thread_index() == 0) {
      Loop::init(smem + kOffsetBarriers);
      ToldWork::init(smem + kOffsetWork, Loop::kProductWarps);
      barrier_init_done();
    }
    sync_block();
    Loop loop(smem, smem + kOffsetBarriers);
    ToldWork told(smem + kOffsetWork);
    const int group = static_cast<int>(broadcast(static_cast<uint32_t>(thread_index() / kWarpgroup))) - 1;
    if (group < 0) {
      release_registers<kLoaderRegisters>();
      if (thread_index() == 0) load_tiles(p, loop, told);
    } else {
      claim_registers<kProductRegisters>();
      WorkItem work;
      while (told.next(work)) {
        typename Loop::Accumulator acc;
        LK_UNROLL
        for (int i = 0; i < Loop::kN / 2; ++i) acc[i] = 0.0f;
        loop.multiply(p.lora.k, group, acc);
        Store::store(p, smem + Loop::kBytesStages, group, work.row, work.column, acc);
      }
      Store::wait();
    }
  }

 private:
  LK_DEVICE static void load_tiles(const Params& p, Loop& loop, ToldWork& told) {
    const int rows = ceil_div(p.lora.m, Loop::kM), columns = ceil_div(p.lora.n, Loop::kN);
    LK_NO_UNROLL
    for (;;) {
      const int ticket = static_cast<int>(atomic_add(p.lora.counters + kTicketCounter, 1));
      if (ticket >= rows * columns) break;
      const WorkItem work = work_of_ticket(ticket, rows, 0, columns, p.lora.group_rows);
      told.tell(work);
      LK_NO_UNROLL
      for (int k = 0; k < p.lora.k; k += Loop::kDepth) {
        loop.fill_stage(Loop::kBytesStage, [&](uint32_t stage, uint32_t barrier) {
          load_box(stage, &p.x, k, work.row * Loop::kM, barrier);
          Loop::load_columns(stage, &p.w, k, work.column * Loop::kN, barrier);
        });
      }
    }
    told.tell_end();
  }
};

}  // namespace lk
