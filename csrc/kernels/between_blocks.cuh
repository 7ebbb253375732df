// How blocks of one launch learn of each other's results.
#pragma once

#include "../device.h"

namespace lk {

// Whether this block is the last of `expected` to arrive; then it sees what the others have written, and the counter is
// zero again. All threads call it. `smem` is a word that is free before, and again after the next barrier.
LK_DEVICE bool arrive_last(uint32_t* counter, int expected, uint32_t smem) {
  sync_block();
  if (thread_index() == 0) {
    const uint32_t before = atomic_add_acquire_release(counter, 1);
    const bool is_last = before + 1 == static_cast<uint32_t>(expected);
    if (is_last) store_global(counter, 0u);
    store_shared_4(smem, is_last ? 1 : 0);
  }
  sync_block();
  return load_shared_4(smem) != 0;
}

}  // namespace lk
