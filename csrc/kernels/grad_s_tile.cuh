// A tile of s' = dY B in the gradient of x on sm_90a, and while dY is in shared memory, these rows' part of dB = dYᵀ s:
// by the two warpgroups that multiply.
#pragma once

#include "../params/lora_linear_wgmma.h"
#include "ring.cuh"
#include "told_work.cuh"

namespace lk {

// kColumns: ranks of a tile. A tile of dY is kRows of its rows and 64 of its columns, which are the depth; so are rows
// of B, as it lies in memory, and of the saved s.
template <class Element, int kColumns>
class GradSTile {
  static_assert(kColumns == 16 || kColumns == 64, "a row of 32 or 128 bytes");
  static constexpr int kGroups = 2, kRows = 128, kGroupRows = kRows / kGroups, kDepth = 64, kFragmentDepth = 16;
  static constexpr int kRowBytes = kColumns * 2, kRowBytesGradY = 128;
  using Product = Warpgroup<Element>;

 public:
  static constexpr int kBytesFactor = kDepth * kRowBytes;  // of B, in a stage
  // Parts of dB take as much traffic per rank as 1/32 of dY: beyond a narrow tile it is cheaper to read dY twice.
  static constexpr bool kHasParts = kColumns == 16;
  static constexpr int kBytesSavedS = kRows * kRowBytes;
  // Of a block of rows, and tile of ranks: arrivals at its flag.
  static constexpr int kArrivals = kGroups;

  // The saved s comes to where the first group's staging tile is, at a barrier of its own.
  LK_DEVICE GradSTile(const LoraWgmmaParams& p, uint32_t staging, uint32_t barrier)
      : p_(p), staging_(staging), barrier_(barrier) {}

  // All threads of both groups call it.
  template <class Loop>
  LK_DEVICE void compute(const WorkItem& work, int group, Loop& loop) {
    static_assert(Loop::kM == kRows && Loop::kGroups == kGroups && Loop::kDepth == kDepth);
    const LoraLinearParams& p = p_.lora;
    const bool has_parts = kHasParts && p.partial_grad_b != nullptr;
    if (has_parts) fetch_saved_s(work.row * kRows, group);
    float* const part = p.partial_grad_b + static_cast<int64_t>(work.row) * p.k * kColumns;
    float acc[kColumns / 2] = {};
    LK_NO_UNROLL
    for (int n0 = 0; n0 < p.k; n0 += kDepth) {
      loop.use_stage([&](uint32_t stage) {
        multiply_rows(acc, Loop::rows_of(stage, group), stage + Loop::kOffsetW);
        if constexpr (kHasParts) {
          // The groups take turns.
          if (has_parts && n0 / kDepth % kGroups == group) part_of_grad_b(stage, part, n0);
        }
      });
    }
    store(acc, work.row * kRows + group * kGroupRows, work.column * kColumns);
    fence_proxy_async();  // the copy engine reads s'
    sync_named(1 + group, kWarpgroup);
    if (leads()) atomic_add_acquire_release(p.counters + kFirstFlag + work.row, 1);
    if (has_parts) sync_named(1 + kGroups, kGroups * kWarpgroup);  // nobody reads the saved s any more
  }

 private:
  LK_DEVICE static int lane() { return thread_index() % kWarp; }
  LK_DEVICE static int warp_row() { return thread_index() % kWarpgroup / kWarp * 16; }
  LK_DEVICE static bool leads() { return thread_index() % kWarpgroup == 0; }

  LK_DEVICE void fetch_saved_s(int row, int group) {
    if (leads() && group == 0) {
      store_wait_read<0>();  // of the tile before
      barrier_arrive_expecting(barrier_, kBytesSavedS);
      load_box(staging_, &p_.saved_s, 0, row, barrier_);
    }
    barrier_wait(barrier_, saved_.full_parity());
    saved_.advance();
  }

  // acc += rows of dY, times B.
  LK_DEVICE static void multiply_rows(float (&acc)[kColumns / 2], uint64_t rows, uint32_t factor) {
    const uint64_t columns = turned(factor);
    multiply_fence();
    LK_UNROLL
    for (int i = 0; i < kDepth / kFragmentDepth; ++i) {
      Product::template multiply_add_async<true>(acc, rows + i * kFragmentDepth * 2 / 16, columns + i * kNextDepth,
                                                 true);
    }
    multiply_commit();
    multiply_wait<0>(acc);
  }

  // Of 64 rows of dB, the sum over this tile's rows of dY.
  LK_DEVICE void part_of_grad_b(uint32_t grad_y, float* part, int n0) const {
    const uint64_t rows = matrix_descriptor(grad_y, 0, 8 * kRowBytesGradY), columns = turned(staging_);
    float acc[kColumns / 2];
    multiply_fence();
    LK_UNROLL
    for (int i = 0; i < kRows / kFragmentDepth; ++i) {
      Product::template multiply_add_async<true, true>(acc, rows + i * kFragmentDepth * kRowBytesGradY / 16,
                                                       columns + i * kNextDepth, i > 0);
    }
    multiply_commit();
    multiply_wait<0>(acc);
    for_halves([&](int half, int row) {
      if (n0 + row >= p_.lora.k) return;
      LK_UNROLL
      for (int i = 0; i < kColumns / 8; ++i) {
        float* const out = part + static_cast<int64_t>(n0 + row) * kColumns + i * 8 + FragmentC::column(lane());
        store_global(reinterpret_cast<Float2*>(out), Float2{acc[i * 4 + half * 2], acc[i * 4 + half * 2 + 1]});
      }
    });
  }

  // B, or s: rows of memory are the depth. In units of a descriptor's address, 16 of the depth on.
  static constexpr int kNextDepth = kFragmentDepth * kRowBytes / 16;
  LK_DEVICE static uint64_t turned(uint32_t address) { return matrix_descriptor<kRowBytes>(address, 0, 8 * kRowBytes); }

  LK_DEVICE void store(const float (&acc)[kColumns / 2], int row0, int rank0) const {
    const LoraLinearParams& p = p_.lora;
    for_halves([&](int half, int row) {
      if (row0 + row >= p.m) return;
      auto* const s = static_cast<uint16_t*>(p.s) + static_cast<int64_t>(row0 + row) * p.rank;
      LK_UNROLL
      for (int i = 0; i < kColumns / 8; ++i) {
        const int column = rank0 + i * 8 + FragmentC::column(lane());
        if (column >= p.rank) continue;  // which is even
        store_global(reinterpret_cast<uint32_t*>(s + column),
                     Element::pack(acc[i * 4 + half * 2], acc[i * 4 + half * 2 + 1]));
      }
    });
  }

  // f(half of the accumulators, row of the group's 64) for a thread's two rows.
  template <class F>
  LK_DEVICE static void for_halves(const F& f) {
    LK_UNROLL
    for (int half = 0; half < 2; ++half) f(half, warp_row() + FragmentC::row(lane()) + half * 8);
  }

  const LoraWgmmaParams& p_;
  uint32_t staging_, barrier_;
  Ring<1> saved_;
};

}  // namespace lk
