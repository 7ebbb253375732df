// The tickets of a cluster of two blocks, which work on neighbouring tiles at the same time: one draws, and tells the
// other.
#pragma once

#include "between_blocks.cuh"
#include "ring.cuh"

namespace lk {

// By one thread of each block.
class ClusterTickets {
  static constexpr int kBytesSlot = 8;
  using Barriers = RingBarriers<1>;

 public:
  static constexpr int kBytes = kBytesSlot + Barriers::kBytes;

  LK_DEVICE static void init(uint32_t smem) { Barriers::init(smem + kBytesSlot, 1, 1); }

  LK_DEVICE ClusterTickets(uint32_t smem, uint32_t* counters) : smem_(smem), counters_(counters) {}

  // The next one, the same in both blocks. Who draws is at most one ticket ahead of who hears.
  LK_DEVICE int next() { return static_cast<int>(cluster_rank() == kDrawer ? draw() : hear()); }

 private:
  static constexpr uint32_t kDrawer = 0, kListener = 1;

  LK_DEVICE uint32_t draw() {
    const uint32_t ticket = atomic_add(counters_ + kTicketCounter, 1), there = cluster_address(smem_, kListener);
    barrier_wait_cluster(Barriers::empty(smem_ + kBytesSlot, 0), slot_.empty_parity());
    store_cluster_4(there, ticket);
    barrier_release_cluster(Barriers::full(there + kBytesSlot, 0));
    slot_.advance();
    return ticket;
  }

  LK_DEVICE uint32_t hear() {
    barrier_wait_cluster(Barriers::full(smem_ + kBytesSlot, 0), slot_.full_parity());
    const uint32_t ticket = load_shared_4(smem_);
    barrier_release_cluster(Barriers::empty(cluster_address(smem_ + kBytesSlot, kDrawer), 0));
    slot_.advance();
    return ticket;
  }

  const uint32_t smem_;
  uint32_t* const counters_;
  Ring<1> slot_;
};

}  // namespace lk
