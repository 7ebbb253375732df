// The copy engine of sm_90: boxes of matrices, to shared memory and back.
#pragma once

#include <cstdint>

#include "../params/tensor_map.h"

namespace lk {

// What this thread has stored is seen by the engines (copies, products of warpgroups) that are told later; behind a
// flag from another block, the engines of this thread see what that block has shown so. All memory, or shared memory.
LK_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async;" ::: "memory"); }
LK_DEVICE void fence_proxy_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

LK_DEVICE void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// The box at (column, row) comes to shared memory, and its bytes count at the barrier. Outside of the matrix is zero.
LK_DEVICE void load_box(uint32_t address, const TensorMap* map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(address),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// The box at (column, row) is written, where it is inside of the matrix.
LK_DEVICE void store_box(const TensorMap* map, int column, int row, uint32_t address) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
               "r"(column), "r"(row), "r"(address)
               : "memory");
}

LK_DEVICE void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until at most kPending of this thread's groups may still read shared memory.
template <int kPending>
LK_DEVICE void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

}  // namespace lk
