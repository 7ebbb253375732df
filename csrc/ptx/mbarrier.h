// Barriers of sm_90 that stand in shared memory: some threads arrive, and bytes of copies; others wait. And barriers of
// some of a block's warps, by number.
#pragma once

#include <cstdint>

namespace lk {

constexpr int kBytesBarrier = 8;

// A phase is complete when so many have arrived, with the bytes that they expect; the next one begins.
LK_DEVICE void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After this thread's inits, and before the barrier of the block that lets others use them.
LK_DEVICE void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

LK_DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// And expects so many bytes of copies in this phase.
LK_DEVICE void barrier_arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Returns when the phase of this parity is complete. The phase before the first one counts as complete, with parity 1.
LK_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{.reg .pred p;\nwait_%=:\n mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n @!p bra wait_%=;}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}

// Barrier 1 to 15, of so many threads in whole warps.
LK_DEVICE void sync_named(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace lk
