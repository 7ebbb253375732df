// Step 3, ticketed: one launch. Tiles of s and of y are work items of the same kernel.
//
// Step 2 computed s in a launch of its own: of one block per 128 rows, while the other SMs had nothing to do, and the
// tiles of y began when the last of them had ended. But a tile of y needs s last, and of its own rows alone:
//
//     ticket   0      1      2        3        4        5
//     work    [s 0]  [s 1]  [y 0,0]  [y 1,0]  [y 0,1]  [y 1,1]     y r,c looks for s r at its own end, and rarely waits
//
// - A block draws a ticket: its work follows the order in which blocks start, not their index.
// - Tickets of s come first. Whoever waits waits for a lower ticket, whose block has started and waits for nobody: no
//   deadlock, however few blocks fit on the GPU.
// - s goes from block to block by a flag: the writers' barrier, then a release; an acquire, then the readers' barrier.
//
// The products are step 2's. The library (csrc/kernels/lora_linear.cuh) draws tickets by groups of rows, so that x
// stays in the L2 cache, and has narrower tiles of s.
#pragma once

#include "step2_tiled.cuh"

namespace lk::tour {

struct Work {
  bool is_s;
  int row, column;  // of tiles
};

LK_DEVICE int tiles_of_s(const Problem& p) { return ceil_div(p.m, kM) * ceil_div(p.rank, kRankTile); }

LK_DEVICE Work work_of(const Problem& p, int ticket) {
  const bool is_s = ticket < tiles_of_s(p);
  const int rows = ceil_div(p.m, kM), i = is_s ? ticket : ticket - tiles_of_s(p);
  return {is_s, i % rows, i / rows};
}

LK_DEVICE int draw_ticket(const Problem& p) { return static_cast<int>(atomic_add(p.counters, 1)); }

// Of a ticket for the block, by way of a word of shared memory.
LK_DEVICE Work draw_work(const Problem& p, uint32_t smem) {
  if (thread_index() == 0) store_shared_4(smem, static_cast<uint32_t>(draw_ticket(p)));
  sync_block();
  return work_of(p, static_cast<int>(load_shared_4(smem)));
}

constexpr int kOffsetWord = Tiled<kTileN>::kSharedBytes, kTicketedSharedBytes = kOffsetWord + 4;

// A flag for every 128 rows counts the tiles of s that are stored.
LK_DEVICE uint32_t* flag_of(const Problem& p, int row) { return p.counters + 1 + row; }

// By one thread, behind a barrier that all who have stored the tile have reached.
LK_DEVICE void tell_s(const Problem& p, int row) { atomic_add_acquire_release(flag_of(p, row), 1); }

// By one thread, in front of what shows the others that s is there.
LK_DEVICE void wait_for_s(const Problem& p, int row) {
  const uint32_t all = static_cast<uint32_t>(ceil_div(p.rank, kRankTile));
  while (load_acquire(flag_of(p, row)) != all) pause();
}

LK_KERNEL(kThreads, 1) step3(const Problem p) {
  const uint32_t smem = dynamic_shared();
  const Work work = draw_work(p, smem + kOffsetWord);
  const int row0 = work.row * kM;
  if (work.is_s) {
    tile_of_s(p, smem, row0, work.column * kRankTile);
    sync_block();
    if (thread_index() == 0) tell_s(p, work.row);
    return;
  }
  using Product = Tiled<kTileN>;
  const int column0 = work.column * kTileN;
  Product::Accumulator acc = {};
  Product::run(smem, {p.x, p.m, p.k}, row0, {p.w, p.n, p.k}, column0, acc);
  if (thread_index() == 0) wait_for_s(p, work.row);
  sync_block();  // s is there for all, and the stages are free
  Product::run(smem, {p.s, p.m, p.rank}, row0, {p.b, p.n, p.rank}, column0, acc);
  Product::store(p.y, p.m, p.n, row0, column0, acc, 1.0f, p.bias);
}

}  // namespace lk::tour
