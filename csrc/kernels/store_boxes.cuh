// The epilogue on sm_90a: y = acc + bias, by way of staging tiles that the copy engine stores.
#pragma once

#include "../params/lora_linear_wgmma.h"
#include "gemm_wgmma.cuh"

namespace lk {

// kTiles: staging tiles of a group, of which one is filled while others are stored.
template <class Loop, int kTiles>
struct StoreBoxes {
  using Element = typename Loop::Element;
  static constexpr int kColumns = 64, kRowBytes = Loop::kRowBytes;
  static constexpr int kBytesTile = Loop::kGroupRows * kRowBytes, kBytes = Loop::kGroups * kTiles * kBytesTile;

  LK_DEVICE static void store(const LoraWgmmaParams& p, uint32_t staging, int group, int row_block, int column_block,
                              const typename Loop::Accumulator& acc) {
    const int lane = thread_index() % kWarp, row = thread_index() % kWarpgroup / kWarp * 16 + lane % 16;
    LK_UNROLL
    for (int chunk = 0; chunk < Loop::kN / kColumns; ++chunk) {
      const uint32_t tile = staging + static_cast<uint32_t>((group * kTiles + chunk % kTiles) * kBytesTile);
      const int column0 = column_block * Loop::kN + chunk * kColumns;
      if (leads()) store_wait_read<kTiles - 1>();
      sync_named(1 + group, kWarpgroup);  // the staging tile is free
      LK_UNROLL
      for (int i = 0; i < kColumns / 16; ++i) {
        const float* const d = acc + chunk * kColumns / 2 + i * 8;
        uint32_t packed[4];
        LK_UNROLL
        for (int half = 0; half < 2; ++half) {
          const Float2 bias = bias_of(p.lora, column0 + i * 16 + half * 8 + FragmentC::column(lane));
          packed[half * 2] = Element::pack(d[half * 4] + bias.x, d[half * 4 + 1] + bias.y);
          packed[half * 2 + 1] = Element::pack(d[half * 4 + 2] + bias.x, d[half * 4 + 3] + bias.y);
        }
        const int place = (i * 2 + lane / 16) ^ (row & 7);
        store_matrix_x4(tile + static_cast<uint32_t>(row * kRowBytes + place * kChunkBytes), packed);
      }
      fence_proxy_async_shared();
      sync_named(1 + group, kWarpgroup);
      if (leads()) {
        store_box(&p.y, column0, row_block * Loop::kM + group * Loop::kGroupRows, tile);
        store_commit();
      }
    }
  }

  // The block's shared memory ends with its threads.
  LK_DEVICE static void wait() {
    if (leads()) store_wait_read<0>();
  }

 private:
  LK_DEVICE static bool leads() { return thread_index() % kWarpgroup == 0; }

  // Of a column and the next one.
  LK_DEVICE static Float2 bias_of(const LoraLinearParams& p, int column) {
    if (p.bias == nullptr || column >= p.n) return {0.0f, 0.0f};
    const auto* const bias = static_cast<const typename Element::Storage*>(p.bias) + column;
    return {Element::low(load_global(bias)), Element::low(load_global(bias + 1))};
  }
};

}  // namespace lk
