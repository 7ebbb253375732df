// Rows of elements as the kernels move them that multiply no matrices: several neighbours at a time, or a warp a row.
#pragma once

#include <type_traits>

#include "../params/common.h"
#include "../tile.h"
#include "variants.h"

namespace lk {

LK_DEVICE int lane_index() { return thread_index() % kWarp; }
LK_DEVICE int warp_index() { return thread_index() / kWarp; }

struct Float32;

// Elements of one type, several neighbours at a time: one, or of an aligned row four, or eight of 16 bits.
template <class Element>
struct Elements {
  using Bits = uint16_t;

  LK_DEVICE static void load(const Bits* p, float (&f)[1]) { f[0] = Element::low(load_global(p)); }
  LK_DEVICE static void store(Bits* p, const float (&f)[1]) { store_global(p, packed(f)); }

  LK_DEVICE static void load(const Bits* p, float (&f)[4]) {
    const uint64_t bits = load_global(reinterpret_cast<const uint64_t*>(p));
    const auto low = static_cast<uint32_t>(bits), high = static_cast<uint32_t>(bits >> 32);
    f[0] = Element::low(low);
    f[1] = Element::high(low);
    f[2] = Element::low(high);
    f[3] = Element::high(high);
  }
  LK_DEVICE static void store(Bits* p, const float (&f)[4]) { store_global(reinterpret_cast<uint64_t*>(p), packed(f)); }

  LK_DEVICE static void load(const Bits* p, float (&f)[8]) {
    const Vec16 v = load_global(reinterpret_cast<const Vec16*>(p));
    LK_UNROLL
    for (int i = 0; i < 4; ++i) {
      f[2 * i] = Element::low(v.word[i]);
      f[2 * i + 1] = Element::high(v.word[i]);
    }
  }
  LK_DEVICE static void store(Bits* p, const float (&f)[8]) {
    store_global(reinterpret_cast<Vec16*>(p), Vec16{{Element::pack(f[0], f[1]), Element::pack(f[2], f[3]),
                                                     Element::pack(f[4], f[5]), Element::pack(f[6], f[7])}});
  }

  LK_DEVICE static Bits packed(const float (&f)[1]) { return static_cast<Bits>(Element::pack(f[0], 0.0f)); }
  LK_DEVICE static uint64_t packed(const float (&f)[4]) {
    return Element::pack(f[0], f[1]) | static_cast<uint64_t>(Element::pack(f[2], f[3])) << 32;
  }
};

template <>
struct Elements<Float32> {
  using Bits = float;

  LK_DEVICE static void load(const float* p, float (&f)[1]) { f[0] = load_global(p); }
  LK_DEVICE static void store(float* p, const float (&f)[1]) { store_global(p, f[0]); }

  LK_DEVICE static void load(const float* p, float (&f)[4]) {
    const Vec16 v = load_global(reinterpret_cast<const Vec16*>(p));
    LK_UNROLL
    for (int i = 0; i < 4; ++i) f[i] = float_of(v.word[i]);
  }
  LK_DEVICE static void store(float* p, const float (&f)[4]) {
    store_global(reinterpret_cast<Vec16*>(p), Vec16{{bits_of(f[0]), bits_of(f[1]), bits_of(f[2]), bits_of(f[3])}});
  }
};

// What a row is copied in.
template <class Bits, bool kAligned>
struct CopyUnit {
  using Type = Vec16;
};
template <class Bits>
struct CopyUnit<Bits, false> {
  using Type = Bits;
};

// One warp writes out[0 ... count): out[i] = load(i). Several loads are under way at a time.
template <class Unit, class Load>
LK_DEVICE void write_row(Unit* out, int count, const Load& load) {
  constexpr int kBatch = 4;
  LK_NO_UNROLL
  for (int first = lane_index(); first < count; first += kBatch * kWarp) {
    Unit units[kBatch] = {};
    LK_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      if (first + i * kWarp < count) units[i] = load(first + i * kWarp);
    }
    LK_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      if (first + i * kWarp < count) store_global(out + first + i * kWarp, units[i]);
    }
  }
}

// A row of NaN, in any type of elements.
template <class Unit>
LK_DEVICE void write_nan_row(void* out, int bytes) {
  write_row(static_cast<Unit*>(out), bytes / static_cast<int>(sizeof(Unit)), [](int) {
    if constexpr (std::is_same_v<Unit, Vec16>) {
      return Vec16{{~0u, ~0u, ~0u, ~0u}};
    } else if constexpr (std::is_same_v<Unit, float>) {
      return float_of(~0u);
    } else {
      return static_cast<Unit>(~Unit{0});
    }
  });
}

template <class Unit>
LK_DEVICE void copy_row(void* out, const void* source, int bytes) {
  const Unit* const units = static_cast<const Unit*>(source);
  write_row(static_cast<Unit*>(out), bytes / static_cast<int>(sizeof(Unit)),
            [&](int i) { return load_global(units + i); });
}

// The kernels that a template of an element type and of whether rows are aligned has. float64 is not served.
struct RowsKey {
  FloatType type;
  bool aligned;

  friend constexpr bool operator==(const RowsKey&, const RowsKey&) = default;
};

template <template <class, bool> class Kernel>
using RowVariants = VariantList<Variant<RowsKey{FloatType::kFloat32, true}, Kernel<Float32, true>>,
                                Variant<RowsKey{FloatType::kFloat32, false}, Kernel<Float32, false>>,
                                Variant<RowsKey{FloatType::kBFloat16, true}, Kernel<BFloat16, true>>,
                                Variant<RowsKey{FloatType::kBFloat16, false}, Kernel<BFloat16, false>>,
                                Variant<RowsKey{FloatType::kFloat16, true}, Kernel<Float16, true>>,
                                Variant<RowsKey{FloatType::kFloat16, false}, Kernel<Float16, false>>>;

}  // namespace lk
