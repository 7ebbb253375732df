// Slots in shared memory that one side fills and the other empties, with two barriers each: `full`, on which who reads
// waits, and `empty`, on which who writes waits.
#pragma once

#include "../device_sm90.h"

namespace lk {

// A side's position: which slot is next, and which of the slot's phases. It counts in one register.
template <int kSlots>
class Ring {
  static_assert((kSlots & (kSlots - 1)) == 0, "a division by a power of two is no division");

 public:
  LK_DEVICE uint32_t slot() const { return count_ % kSlots; }
  LK_DEVICE void advance() { ++count_; }

  // Of the phase of `full` to wait for; and of the phase of `empty`, the first of which is complete from the beginning.
  LK_DEVICE uint32_t full_parity() const { return count_ / kSlots & 1; }
  LK_DEVICE uint32_t empty_parity() const { return full_parity() ^ 1; }

 private:
  uint32_t count_ = 0;
};

// The barriers of a ring in shared memory.
template <int kSlots>
struct RingBarriers {
  static constexpr int kBytes = 2 * kSlots * kBytesBarrier;

  LK_DEVICE static uint32_t full(uint32_t barriers, uint32_t slot) { return barriers + slot * kBytesBarrier; }
  LK_DEVICE static uint32_t empty(uint32_t barriers, uint32_t slot) { return full(barriers, kSlots + slot); }

  LK_DEVICE static void init(uint32_t barriers, int fillers, int readers) {
    for (uint32_t slot = 0; slot < kSlots; ++slot) {
      barrier_init(full(barriers, slot), fillers);
      barrier_init(empty(barriers, slot), readers);
    }
  }
};

}  // namespace lk
