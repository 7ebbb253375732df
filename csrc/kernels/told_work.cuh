// Which tiles a block computes, told by the thread that draws its tickets to the warps that work: it is ahead of them.
#pragma once

#include "between_blocks.cuh"
#include "ring.cuh"

namespace lk {

class ToldWork {
  static constexpr int kSlots = 2, kBytesSlot = 8;
  static constexpr uint32_t kNoMore = ~0u, kShrinks = 1u << 31;  // in the place of a row, and beside it
  using Barriers = RingBarriers<kSlots>;

 public:
  static constexpr int kBytes = kSlots * kBytesSlot + Barriers::kBytes;

  // listeners: warps.
  LK_DEVICE static void init(uint32_t smem, int listeners) { Barriers::init(smem + kSlots * kBytesSlot, 1, listeners); }

  LK_DEVICE explicit ToldWork(uint32_t smem) : smem_(smem) {}

  LK_DEVICE void tell(const WorkItem& work) {
    tell(static_cast<uint32_t>(work.row) | (work.is_shrink ? kShrinks : 0), static_cast<uint32_t>(work.column));
  }
  LK_DEVICE void tell_end() { tell(kNoMore, 0); }

  // By whole warps. Whether there is more.
  LK_DEVICE bool next(WorkItem& work) {
    barrier_wait(Barriers::full(barriers(), ring_.slot()), ring_.full_parity());
    uint64_t told = 0;
    if (thread_index() % kWarp == 0) {
      told = load_shared_8(smem_ + ring_.slot() * kBytesSlot);
      barrier_arrive(Barriers::empty(barriers(), ring_.slot()));
    }
    const uint32_t row = broadcast(static_cast<uint32_t>(told)), column = broadcast(static_cast<uint32_t>(told >> 32));
    ring_.advance();
    work = {(row & kShrinks) != 0, static_cast<int>(row & ~kShrinks), static_cast<int>(column)};
    return row != kNoMore;
  }

 private:
  LK_DEVICE uint32_t barriers() const { return smem_ + kSlots * kBytesSlot; }

  LK_DEVICE void tell(uint32_t row, uint32_t column) {
    barrier_wait(Barriers::empty(barriers(), ring_.slot()), ring_.empty_parity());
    store_shared_8(smem_ + ring_.slot() * kBytesSlot, {float_of(row), float_of(column)});
    barrier_arrive(Barriers::full(barriers(), ring_.slot()));
    ring_.advance();
  }

  uint32_t smem_;
  Ring<kSlots> ring_;
};

}  // namespace lk
