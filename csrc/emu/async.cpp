// The names of async.h.
#include "async.h"

#include "machine_parts.h"

namespace lk::emu {

uint32_t broadcast(uint32_t value, Site site) {
  uint32_t first;
  Operands operands{};
  operands.r = &first;
  operands.address = value;
  running().join_collective(Collective::kBroadcast, operands, site);
  return first;
}

void store_matrix(uint32_t row_address, const uint32_t (&r)[4], Site site) {
  Operands operands{};
  operands.address = row_address;
  operands.a = r;
  running().join_collective(Collective::kStoreMatrix, operands, site);
}

void sync_named(int barrier, int threads, Site site) { running().sync_named(barrier, threads, site); }
void barrier_init(uint32_t barrier, int arrivals, Site site) { running().barrier_init(barrier, arrivals, site); }
void barrier_init_done(Site site) { running().barrier_init_done(site); }
void barrier_arrive(uint32_t barrier, int bytes, Site site) { running().barrier_arrive(barrier, bytes, site); }
void barrier_wait(uint32_t barrier, uint32_t parity, Site site) {
  running().barrier_wait(barrier, parity, false, site);
}
void fence_proxy_async(bool shared_only, Site site) { running().fence_proxy_async(shared_only, site); }

uint32_t cluster_rank() { return static_cast<uint32_t>(running().cluster_rank()); }

uint32_t cluster_address(uint32_t address, uint32_t rank, Site site) {
  return running().cluster_address(address, rank, site);
}

void sync_cluster(Site site) { running().sync_cluster(site); }

void store_cluster(uint32_t address, const void* source, size_t bytes, Site site) {
  running().store_cluster(address, source, bytes, site);
}

void barrier_arrive_cluster(uint32_t barrier, bool releases, Site site) {
  running().barrier_arrive_cluster(barrier, releases, site);
}

void barrier_wait_cluster(uint32_t barrier, uint32_t parity, Site site) {
  running().barrier_wait(barrier, parity, true, site);
}

void load_box(uint32_t address, const BoxMap& map, int column, int row, uint32_t barrier, Site site) {
  running().load_box(address, map, column, row, barrier, 1u << running().cluster_rank(), site);
}

void load_box_cluster(uint32_t address, const BoxMap& map, int column, int row, uint32_t barrier, uint32_t ranks,
                      Site site) {
  running().load_box(address, map, column, row, barrier, ranks, site);
}

void store_box(const BoxMap& map, int column, int row, uint32_t address, Site site) {
  running().store_box(map, column, row, address, site);
}

void store_commit() { running().store_commit(); }
void store_wait_read(int pending, Site site) { running().store_wait_read(static_cast<size_t>(pending), site); }
void multiply_fence(Site site) { running().multiply_fence(site); }

void multiply_add_async(const ProductOf& product, float* d, Site site) {
  running().multiply_add_async(product, d, site);
}

void multiply_commit() { running().multiply_commit(); }
void multiply_wait(int pending, Site site) { running().multiply_wait(static_cast<size_t>(pending), site); }

}  // namespace lk::emu
