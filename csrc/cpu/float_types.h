// 16-bit floating-point types as bit patterns, and conversions that compilers vectorise: no branches, and right for
// subnormals even where the thread flushes them to zero. Rounding is to nearest even, as torch rounds. Each translation
// unit has its own, compiled for its own instruction set.
#pragma once

#include <cstdint>
#include <type_traits>

namespace lk::cpu {
namespace {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(double x) { return static_cast<float>(x); }
inline float to_float(BFloat16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(Float16 x) {
  constexpr uint32_t kRebias = 112u << 23;
  const uint32_t sign = (x.bits & 0x8000u) << 16, body = (x.bits & 0x7FFFu) << 13, exponent = body & (0x1Fu << 23);
  const uint32_t normal = body + kRebias + (exponent == (0x1Fu << 23) ? kRebias : 0u);
  const uint32_t subnormal =
      __builtin_bit_cast(uint32_t, static_cast<float>(static_cast<int32_t>(x.bits & 0x3FFu)) * 0x1p-24f);
  return __builtin_bit_cast(float, sign | (exponent == 0 ? subnormal : normal));
}

template <class To>
To from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline double from_float<double>(float x) {
  return x;
}

template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded)};
}

template <>
inline Float16 from_float<Float16>(float x) {
  constexpr uint32_t kRebias = 112u << 23, kSmallestNormal = 113u << 23, kOverflow = 0x477FF000u,
                     kInfinity = 0x7F800000u;
  const uint32_t bits = __builtin_bit_cast(uint32_t, x), sign = bits >> 16 & 0x8000u, body = bits & 0x7FFFFFFFu;
  const uint32_t normal = (body - kRebias + 0xFFFu + (body >> 13 & 1u)) >> 13;
  // Adding 0.5 moves the last bit that fp16 has at this size to the last bit of the sum, rounding on the way.
  const uint32_t subnormal =
      __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, body) + 0.5f) - __builtin_bit_cast(uint32_t, 0.5f);
  uint32_t half = body < kSmallestNormal ? subnormal : normal;
  half = body >= kOverflow ? 0x7C00u : half;
  half = body > kInfinity ? 0x7E00u : half;
  return {static_cast<uint16_t>(sign | half)};
}

template <class To, class From>
inline To convert(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else if constexpr (std::is_arithmetic_v<To> && std::is_arithmetic_v<From>) {
    return static_cast<To>(x);
  } else {
    return from_float<To>(to_float(x));
  }
}

}  // namespace
}  // namespace lk::cpu
