// The emulator's twin of csrc/ptx/mbarrier.h.
#pragma once

#include <cstdint>

#include "../async.h"

namespace lk {

constexpr int kBytesBarrier = 8;

inline void barrier_init(uint32_t barrier, int arrivals, emu::Site site = emu::Site::current()) {
  emu::barrier_init(barrier, arrivals, site);
}

inline void barrier_init_done(emu::Site site = emu::Site::current()) { emu::barrier_init_done(site); }

inline void barrier_arrive(uint32_t barrier, emu::Site site = emu::Site::current()) {
  emu::barrier_arrive(barrier, 0, site);
}

inline void barrier_arrive_expecting(uint32_t barrier, int bytes, emu::Site site = emu::Site::current()) {
  emu::barrier_arrive(barrier, bytes, site);
}

inline void barrier_wait(uint32_t barrier, uint32_t parity, emu::Site site = emu::Site::current()) {
  emu::barrier_wait(barrier, parity, site);
}

inline void sync_named(int barrier, int threads, emu::Site site = emu::Site::current()) {
  emu::sync_named(barrier, threads, site);
}

}  // namespace lk
