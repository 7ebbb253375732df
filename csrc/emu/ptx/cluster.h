// The emulator's twin of csrc/ptx/cluster.h.
#pragma once

#include <cstdint>

#include "../async.h"

namespace lk {

inline uint32_t cluster_rank() { return emu::cluster_rank(); }

inline void sync_cluster(emu::Site site = emu::Site::current()) { emu::sync_cluster(site); }

inline uint32_t cluster_address(uint32_t address, uint32_t rank, emu::Site site = emu::Site::current()) {
  return emu::cluster_address(address, rank, site);
}

inline void store_cluster_4(uint32_t address, uint32_t v, emu::Site site = emu::Site::current()) {
  emu::store_cluster(address, &v, sizeof v, site);
}

inline void barrier_arrive_cluster(uint32_t barrier, emu::Site site = emu::Site::current()) {
  emu::barrier_arrive_cluster(barrier, false, site);
}

inline void barrier_release_cluster(uint32_t barrier, emu::Site site = emu::Site::current()) {
  emu::barrier_arrive_cluster(barrier, true, site);
}

inline void barrier_wait_cluster(uint32_t barrier, uint32_t parity, emu::Site site = emu::Site::current()) {
  emu::barrier_wait_cluster(barrier, parity, site);
}

inline void load_box_cluster(uint32_t address, const TensorMap* map, int column, int row, uint32_t barrier,
                             uint32_t ranks, emu::Site site = emu::Site::current()) {
  emu::load_box_cluster(address, emu::decoded(map), column, row, barrier, ranks, site);
}

}  // namespace lk
