// The tile scheduler of a launch, and how its blocks learn of each other's results.
#pragma once

#include "../tile.h"

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

// Counters of a launch.
constexpr int kTicketCounter = 0, kDoneCounter = 1, kFirstFlag = 2;

// A piece of work: shrink tile or base tile number `column` of row block `row`, in a pack of a member.
struct WorkItem {
  bool is_shrink;
  int row, column, member = 0;
};

// The work of a ticket. Within a group, row blocks follow each other: neighbours share columns of w, and the group's
// rows of x stay in the L2 cache.
LK_HOST_DEVICE WorkItem work_of_ticket(int ticket, int row_blocks, int shrink_columns, int base_columns,
                                       int group_rows) {
  const int per_group = group_rows * (shrink_columns + base_columns);
  const int first_row = ticket / per_group * group_rows;
  const int rows = smaller(row_blocks - first_row, group_rows);
  const int i = ticket % per_group, column = i / rows;
  const bool is_shrink = column < shrink_columns;
  return {is_shrink, first_row + i % rows, is_shrink ? column : column - shrink_columns};
}

// The block's work lies in shared memory and is read where it is needed: over a main loop, registers are scarce.
constexpr int kBytesWork = 16;

// Draws a ticket for the block; work(ticket) is a WorkItem. All threads call it.
template <class Work>
LK_DEVICE void acquire_work(uint32_t* counters, uint32_t smem, const Work& work) {
  if (thread_index() == 0) {
    const WorkItem item = work(static_cast<int>(atomic_add(counters + kTicketCounter, 1)));
    store_shared_16(smem, {{static_cast<uint32_t>(item.row), static_cast<uint32_t>(item.column),
                            item.is_shrink ? 1u : 0u, static_cast<uint32_t>(item.member)}});
  }
  sync_block();
}

LK_DEVICE WorkItem current_work(uint32_t smem) {
  const Vec16 v = load_shared_16(smem);
  return {v.word[2] != 0, static_cast<int>(v.word[0]), static_cast<int>(v.word[1]), static_cast<int>(v.word[3])};
}

// The block has done its work. The last one sets the counters back. Nobody needs that, since every launch finds
// counters that a memset has zeroed (bind/cuda_counters.h); but without this end of the kernel the compiler spills
// registers of the large tile on sm_80, sm_100 and sm_120.
LK_DEVICE void release_work(uint32_t* counters, int flags) {
  if (thread_index() != 0) return;
  const uint32_t done = atomic_add_acquire_release(counters + kDoneCounter, 1);
  if (done + 1 != static_cast<uint32_t>(block_count())) return;
  for (int i = 0; i < kFirstFlag + flags; ++i) store_global(counters + i, 0u);
}

}  // namespace lk
