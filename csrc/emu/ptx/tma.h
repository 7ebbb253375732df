// The emulator's twin of csrc/ptx/tma.h.
#pragma once

#include <cstdint>

#include "../async.h"

namespace lk {

inline void fence_proxy_async(emu::Site site = emu::Site::current()) { emu::fence_proxy_async(false, site); }
inline void fence_proxy_async_shared(emu::Site site = emu::Site::current()) { emu::fence_proxy_async(true, site); }

inline void prefetch_map(const TensorMap* map) { static_cast<void>(map); }

inline void load_box(uint32_t address, const TensorMap* map, int column, int row, uint32_t barrier,
                     emu::Site site = emu::Site::current()) {
  emu::load_box(address, emu::decoded(map), column, row, barrier, site);
}

inline void store_box(const TensorMap* map, int column, int row, uint32_t address,
                      emu::Site site = emu::Site::current()) {
  emu::store_box(emu::decoded(map), column, row, address, site);
}

inline void store_commit() { emu::store_commit(); }

template <int kPending>
inline void store_wait_read(emu::Site site = emu::Site::current()) {
  emu::store_wait_read(kPending, site);
}

}  // namespace lk
