// Functions of vectors of floats, each within two units of the last place of its result, or of 1 for erfc. As simd.h,
// for translation units of one instruction set.
#pragma once

#include "simd.h"

namespace lk::cpu {
namespace {

typedef int32_t VecI __attribute__((vector_size(LK_VECTOR_BYTES)));

// Of a vector of comparisons.
inline VecF select(VecI mask, VecF yes, VecF no) { return (VecF)(((VecI)yes & mask) | ((VecI)no & ~mask)); }

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction

// e^x as e^r 2^n with |r| <= ln(2) / 2.
struct PowerOfE {
  VecF of_rest, rounded;  // e^r, n + kRound
};

LK_ALWAYS_INLINE inline PowerOfE power_of_e(VecF x) {
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const VecF rounded = x * kLog2e + kRound, n = rounded - kRound;
  const VecF r = x - n * kLn2High - n * kLn2Low;
  VecF p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return {p * (r * r) + r + 1.0f, rounded};
}

// e^x of any x. 2^n goes in two halves: its own exponent may not hold it.
LK_ALWAYS_INLINE inline VecF exp(VecF x) {
  const VecF clamped = select(x > 89.0f, broadcast(89.0f), select(x < -104.0f, broadcast(-104.0f), x));
  const PowerOfE power = power_of_e(clamped);
  const VecI n = __builtin_convertvector(power.rounded - kRound, VecI), half = n >> 1;
  const VecF first = (VecF)((half + 127) << 23), second = (VecF)((n - half + 127) << 23);
  return select(x != x, x, power.of_rest * first * second);
}

// e^x of an x up to 80, of -87 for one below, where e^x is next to nothing: n goes into the exponent as it is.
LK_ALWAYS_INLINE inline VecF exp_of_moderate(VecF x) {
  const PowerOfE power = power_of_e(select(x < -87.0f, broadcast(-87.0f), x));  // NaN stays
  return power.of_rest * (VecF)(((VecU)power.rounded << 23) + broadcast(uint32_t{0x3F800000}));
}

LK_ALWAYS_INLINE inline VecF tanh(VecF x) {
  const VecF most = broadcast(9.0f);  // where it rounds to 1
  const VecF size = and_bits(x, broadcast(uint32_t{0x7FFFFFFF})), clamped = size > most ? most : size;
  const VecF far = 1.0f - 2.0f / (exp_of_moderate(clamped + clamped) + 1.0f), square = x * x;
  VecF p = broadcast(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const VecF near = p * square * x + x;
  const VecU sign = (VecU)x & 0x80000000u;
  return size < broadcast(0.625f) ? near : (VecF)((VecU)far | sign);
}

// 1 - erf(x) by e^(-x^2) and a polynomial of 1 / (1 + |x| / 2), fitted for the least relative error (4.2e-8).
inline VecF erfc(VecF x) {
  const VecF z = (VecF)((VecI)x & 0x7FFFFFFF), t = 1.0f / (1.0f + 0.5f * z);
  VecF p = broadcast(-0.05880057439208031f);
  p = p * t + 0.2832591235637665f;
  p = p * t - 0.4844602048397064f;
  p = p * t + 0.27491289377212524f;
  p = p * t - 0.024436790496110916f;
  p = p * t + 0.20175281167030334f;
  p = p * t + 0.24334219098091125f;
  p = p * t + 0.2823421359062195f;
  p = p * t + 0.28208833932876587f;
  const VecF above = exp(-z * z) * t * p;
  return select(x < 0.0f, 2.0f - above, above);
}

}  // namespace
}  // namespace lk::cpu
