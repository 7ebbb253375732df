// The rows of each adapter, where each row names one: in their order, adapter by adapter.
#pragma once

#include "adapter_pools.cuh"

namespace lk {

// A block for each adapter; its threads take runs of rows.
struct MultiLoraOrder {
  static constexpr int kThreads = 256, kMinBlocks = 1, kSharedBytes = 2 * kThreads * 4;

  LK_DEVICE static void run(const MultiLoraOrderParams& p) {
    const uint32_t lower_smem = dynamic_shared(), own_smem = lower_smem + kThreads * 4;
    const int adapter = block_index(), thread = thread_index(), length = ceil_div(p.m, kThreads);
    const int begin = smaller(thread * length, p.m), end = smaller(begin + length, p.m);
    int lower = 0, own = 0;
    for (int row = begin; row < end; ++row) {
      const int64_t id = integer_at(p.ids, row);
      lower += id >= 0 && id < adapter;
      own += id == adapter;
    }
    store_shared_4(lower_smem + thread * 4, static_cast<uint32_t>(lower));
    store_shared_4(own_smem + thread * 4, static_cast<uint32_t>(own));
    sync_block();
    // Behind all rows of lower adapters, and those of this one that other threads have in front of this one's.
    int place = 0;
    for (int first = 0; first < kThreads; first += 4) {
      const Vec16 lowers = load_shared_16(lower_smem + first * 4), owns = load_shared_16(own_smem + first * 4);
      LK_UNROLL
      for (int i = 0; i < 4; ++i) {
        place += static_cast<int>(lowers.word[i]);
        if (first + i < thread) place += static_cast<int>(owns.word[i]);
      }
    }
    for (int row = own > 0 ? begin : end; row < end; ++row) {
      if (integer_at(p.ids, row) == adapter) store_global(p.rows + place++, row);
    }
    if (thread == kThreads - 1) store_global(p.ends + adapter, place);
  }
};

LK_KERNEL(MultiLoraOrder::kThreads, MultiLoraOrder::kMinBlocks)
multi_lora_order_kernel(const MultiLoraOrderParams p) { MultiLoraOrder::run(p); }

}  // namespace lk
