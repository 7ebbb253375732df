// The emulator's twin of csrc/ptx/core.h.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../machine.h"

namespace lk {

struct alignas(16) Vec16 {
  uint32_t word[4];
};

struct alignas(8) Float2 {
  float x, y;
};

inline float float_of(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

inline uint32_t bits_of(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return bits;
}

inline uint32_t count_ones(uint32_t bits) { return static_cast<uint32_t>(std::popcount(bits)); }

inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector, emu::Site site = emu::Site::current()) {
  if ((selector & 0x8888u) != 0) emu::trap(site);  // there, prmt repeats the byte's sign
  const uint64_t bytes = low | static_cast<uint64_t>(high) << 32;
  uint32_t permuted = 0;
  for (int i = 0; i < 4; ++i) permuted |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  return permuted;
}

// What has been in memory is part of no fma, on a host that has one either.
inline float rounded_product(float a, float b) {
  volatile float product = a * b;
  return product;
}

inline float rounded_sum(float a, float b) { return a + b; }

inline float exponential(float f) { return std::exp(f); }
inline float complementary_error(float f) { return std::erfc(f); }

inline float in_register(float f) { return f; }

// ------------------------------------------------------------------------------------------------ the thread

inline int thread_index() { return emu::thread_index(); }
inline int block_index() { return emu::block_index(); }
inline int block_count() { return emu::block_count(); }

inline void sync_block(emu::Site site = emu::Site::current()) { emu::sync_block(site); }
inline void sync_warp(emu::Site site = emu::Site::current()) { emu::sync_warp(site); }

inline uint32_t warp_ballot(bool flag, emu::Site site = emu::Site::current()) { return emu::warp_ballot(flag, site); }

[[noreturn]] inline void trap(emu::Site site = emu::Site::current()) { emu::trap(site); }

constexpr int kDynamicSharedAlignment = 1024;

inline uint32_t dynamic_shared() { return emu::dynamic_shared(); }

// ---------------------------------------------------------------------------------------------------- memory

template <class T>
inline T load_global(const T* p, emu::Site site = emu::Site::current()) {
  emu::read_global(p, sizeof(T), alignof(T), site);
  T value;
  std::memcpy(&value, p, sizeof value);  // a kernel may see an array as wider elements than it was declared with
  return value;
}

template <class T>
inline void store_global(T* p, T value, emu::Site site = emu::Site::current()) {
  if (emu::write_global(p, sizeof(T), alignof(T), site)) std::memcpy(p, &value, sizeof value);
}

inline Vec16 load_shared_16(uint32_t address, emu::Site site = emu::Site::current()) {
  Vec16 v;
  emu::load_shared(address, &v, sizeof v, site);
  return v;
}

inline uint64_t load_shared_8(uint32_t address, emu::Site site = emu::Site::current()) {
  uint64_t v;
  emu::load_shared(address, &v, sizeof v, site);
  return v;
}

inline uint32_t load_shared_4(uint32_t address, emu::Site site = emu::Site::current()) {
  uint32_t v;
  emu::load_shared(address, &v, sizeof v, site);
  return v;
}

inline void store_shared_16(uint32_t address, const Vec16& v, emu::Site site = emu::Site::current()) {
  emu::store_shared(address, &v, sizeof v, site);
}

inline void store_shared_8(uint32_t address, Float2 v, emu::Site site = emu::Site::current()) {
  emu::store_shared(address, &v, sizeof v, site);
}

inline void store_shared_4(uint32_t address, uint32_t v, emu::Site site = emu::Site::current()) {
  emu::store_shared(address, &v, sizeof v, site);
}

inline void copy_async_16(uint32_t address, const void* source, int bytes, emu::Site site = emu::Site::current()) {
  emu::copy_async(address, source, 16, bytes, site);
}

inline void copy_async_8(uint32_t address, const void* source, int bytes, emu::Site site = emu::Site::current()) {
  emu::copy_async(address, source, 8, bytes, site);
}

inline void copy_async_commit() { emu::copy_async_commit(); }

template <int kPending>
inline void copy_async_wait(emu::Site site = emu::Site::current()) {
  emu::copy_async_wait(kPending, site);
}

// ------------------------------------------------------------------------------------- between blocks: flags

inline uint32_t atomic_add(uint32_t* p, uint32_t value, emu::Site site = emu::Site::current()) {
  return emu::atomic_add(p, value, false, site);
}

inline uint32_t atomic_add_acquire_release(uint32_t* p, uint32_t value, emu::Site site = emu::Site::current()) {
  return emu::atomic_add(p, value, true, site);
}

inline void store_release(uint32_t* p, uint32_t value, emu::Site site = emu::Site::current()) {
  emu::store_release(p, value, site);
}

inline uint32_t load_acquire(const uint32_t* p, emu::Site site = emu::Site::current()) {
  return emu::load_acquire(p, site);
}

inline void pause(emu::Site site = emu::Site::current()) { emu::pause(site); }

// ---------------------------------------------------------------------------------------------- tensor cores

inline void load_matrix_x4(uint32_t (&r)[4], uint32_t row_address, emu::Site site = emu::Site::current()) {
  emu::load_matrix(r, row_address, false, site);
}

inline void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t row_address, emu::Site site = emu::Site::current()) {
  emu::load_matrix(r, row_address, true, site);
}

struct BFloat16 {
  using Storage = uint16_t;

  static uint32_t pack(float low, float high) { return round(low) | round(high) << 16; }
  static float low(uint32_t packed) { return float_of(packed << 16); }
  static float high(uint32_t packed) { return float_of(packed & 0xFFFF0000u); }

  static void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                           emu::Site site = emu::Site::current()) {
    emu::multiply_add(emu::Element::kBFloat16, d, a, b0, b1, site);
  }

 private:
  static uint32_t round(float f) {
    const uint32_t bits = bits_of(f);
    return std::isnan(f) ? 0x7FFFu : (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
  }
};

struct Float16 {
  using Storage = uint16_t;

  static uint32_t pack(float low, float high) { return round(low) | round(high) << 16; }

  static float low(uint32_t packed) {
    const uint32_t sign = (packed & 0x8000u) << 16, magnitude = (packed & 0x7FFFu) << 13;
    // As the bits of a float, subnormal or not, the magnitude lacks only the difference of the exponents' biases.
    const bool finite = magnitude < 0x7C00u << 13;
    const uint32_t bits = finite ? bits_of(float_of(magnitude) * 0x1p112f) : magnitude | 0x7F800000u;
    return float_of(sign | bits);
  }

  static float high(uint32_t packed) { return low(packed >> 16); }

  static void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                           emu::Site site = emu::Site::current()) {
    emu::multiply_add(emu::Element::kFloat16, d, a, b0, b1, site);
  }

 private:
  static uint32_t round(float f) {
    const uint32_t sign = bits_of(f) >> 16 & 0x8000u;
    const float magnitude = std::fabs(f);
    const uint32_t bits = bits_of(magnitude);
    if (std::isnan(f)) return 0x7FFFu;
    if (magnitude >= 65520.0f) return sign | 0x7C00u;
    // The last bit of a float in [0.5, 1) is worth the smallest subnormal: the addition rounds.
    if (magnitude < 0x1p-14f) return sign | (bits_of(magnitude + 0.5f) - bits_of(0.5f));
    return sign | (bits - (112u << 23) + 0xFFFu + (bits >> 13 & 1)) >> 13;
  }
};

struct TensorFloat32 {
  using Storage = uint32_t;

  static uint32_t round(uint32_t bits) {
    if (std::isnan(float_of(bits))) return 0x7FFFFFFFu;
    return (bits + 0x1000u) & ~0x1FFFu;  // the sign apart, bits are ordered like numbers; infinity stays
  }

  static float low(uint32_t bits) { return float_of(bits); }

  static void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                           emu::Site site = emu::Site::current()) {
    emu::multiply_add(emu::Element::kTensorFloat32, d, a, b0, b1, site);
  }
};

}  // namespace lk
