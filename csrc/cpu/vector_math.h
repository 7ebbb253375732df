// Functions of vectors of floats, each within two units of the last place of its result, or of 1 for erfc. As simd.h,
// for translation units of one instruction set.
#pragma once

#include "simd.h"

namespace lk::cpu {
namespace {

typedef int32_t VecI __attribute__((vector_size(LK_VECTOR_BYTES)));

// Of a vector of comparisons.
inline VecF select(VecI mask, VecF yes, VecF no) { return (VecF)(((VecI)yes & mask) | ((VecI)no & ~mask)); }

// e^x by 2^n e^r with |r| <= ln(2) / 2, and NaN where x is. 2^n goes in two halves: its own exponent may not hold it.
inline VecF exp(VecF x) {
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction
  const VecF clamped = select(x > 89.0f, broadcast(89.0f), select(x < -104.0f, broadcast(-104.0f), x));
  const VecF n = clamped * kLog2e + kRound - kRound;
  const VecF r = clamped - n * kLn2High - n * kLn2Low;
  VecF p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const VecI whole = __builtin_convertvector(n, VecI), half = whole >> 1;
  const VecF first = (VecF)((half + 127) << 23), second = (VecF)((whole - half + 127) << 23);
  return select(x != x, x, p * first * second);
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
