// Clusters of sm_90: blocks that run at the same time, whose threads reach each other's shared memory by addresses of
// the cluster.
#pragma once

#include <cstdint>

#include "../params/tensor_map.h"

namespace lk {

// Of this block in its cluster.
LK_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all of the cluster's blocks call it, by whole warps.
LK_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Where the block of this rank has what this one has at `address`: an address of the cluster. Sums of it and an offset
// are likewise.
LK_DEVICE uint32_t cluster_address(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

LK_DEVICE void store_cluster_4(uint32_t address, uint32_t v) {
  asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

// At a barrier of any of the cluster's blocks. To another one it shows nothing that threads have done: it says that
// engines are done with what this thread has waited for. A loop can afford it, and a plain wait.
LK_DEVICE void barrier_arrive_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The same, and who waits for the cluster sees what this thread has seen and stored before: a fence of all memory.
LK_DEVICE void barrier_release_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// As barrier_wait, and this thread sees what others of the cluster have released. The SM's L1 cache forgets what it
// has.
LK_DEVICE void barrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{.reg .pred p;\nwait_%=:\n mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n"
      " @!p bra wait_%=;}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// As load_box, for each of the blocks whose ranks are bits of `ranks`: to where this address is in it, and its bytes
// count at where this barrier is in it. The matrix is read once.
LK_DEVICE void load_box_cluster(uint32_t address, const TensorMap* map, int column, int row, uint32_t barrier,
                                uint32_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
      "{%2, %3}], [%4], %5;" ::"r"(address),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<uint16_t>(ranks))
      : "memory");
}

}  // namespace lk
