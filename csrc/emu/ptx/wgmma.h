// The emulator's twin of csrc/ptx/wgmma.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../async.h"
#include "core.h"

namespace lk {

constexpr int kWarpgroup = 128;

inline uint32_t broadcast(uint32_t value, emu::Site site = emu::Site::current()) { return emu::broadcast(value, site); }

template <int kRegisters>
inline void release_registers() {}
template <int kRegisters>
inline void claim_registers() {}

inline void store_matrix_x4(uint32_t row_address, const uint32_t (&r)[4], emu::Site site = emu::Site::current()) {
  emu::store_matrix(row_address, r, site);
}

inline void multiply_fence(emu::Site site = emu::Site::current()) { emu::multiply_fence(site); }

inline void multiply_commit() { emu::multiply_commit(); }

template <int kPending, int kCount>
inline void multiply_wait(float (&d)[kCount], emu::Site site = emu::Site::current()) {
  static_cast<void>(d);
  emu::multiply_wait(kPending, site);
}

template <int kPending>
inline void multiply_wait(emu::Site site = emu::Site::current()) {
  emu::multiply_wait(kPending, site);
}

template <int kRowBytes = 128>
inline uint64_t matrix_descriptor(uint32_t address, int lead, int stride) {
  constexpr uint64_t kSwizzle = kRowBytes == 128 ? 1 : 3;
  return (address & 0x3FFFF) >> 4 | static_cast<uint64_t>(lead >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 |
         kSwizzle << 62;
}

template <class Element>
struct Warpgroup {
  template <bool kTransposedQ, bool kTransposedP = false, int kCount>
  static void multiply_add_async(float (&d)[kCount], uint64_t p, uint64_t q, bool accumulates,
                                 emu::Site site = emu::Site::current()) {
    const auto element = std::is_same_v<Element, BFloat16> ? emu::Element::kBFloat16 : emu::Element::kFloat16;
    emu::multiply_add_async({element, 2 * kCount, p, q, kTransposedP, kTransposedQ, accumulates}, d, site);
  }
};

}  // namespace lk
