// The widest vector of the instruction set this translation unit is compiled for, through the compilers' vector types.
// Only translation units that export one table of functions include this, and they include no standard templates: an
// inline function compiled for AVX-512 must not replace its portable twin at link time.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LK_VECTOR_BYTES 64
#elif defined(__AVX2__)
#include <immintrin.h>
#define LK_VECTOR_BYTES 32
#else
#define LK_VECTOR_BYTES 16
#endif

// Of inner loops, and of what is given an array of vectors, which compilers keep in memory unless it is inlined early.
#define LK_ALWAYS_INLINE __attribute__((always_inline))

namespace lk::cpu {
namespace {

constexpr int kLanes = LK_VECTOR_BYTES / 4;

typedef float VecF __attribute__((vector_size(LK_VECTOR_BYTES)));
typedef uint32_t VecU __attribute__((vector_size(LK_VECTOR_BYTES)));

inline VecF load(const float* p) {
  VecF v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, VecF v) { memcpy(p, &v, sizeof v); }

inline VecU load(const uint32_t* p) {
  VecU v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline void store(uint32_t* p, VecU v) { memcpy(p, &v, sizeof v); }

inline VecF broadcast(float x) { return x - VecF{}; }
inline VecU broadcast(uint32_t x) { return x + VecU{}; }

// Lane i is lane from[i] of a, or from[i] - kLanes of b; `from` is known when this is compiled.
LK_ALWAYS_INLINE inline VecF shuffle(VecF a, VecF b, VecU from) {
#if defined(__clang__)
  VecF out;
  for (int i = 0; i < kLanes; ++i) out[i] = from[i] < kLanes ? a[from[i]] : b[from[i] - kLanes];
  return out;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

inline VecF and_bits(VecF v, VecU bits) { return (VecF)((VecU)v & bits); }

// Of all lanes, pairwise.
inline float sum(VecF v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  }
  return v[0];
#endif
}

// hi and lo halves of the 32 x 32 -> 64 bit products of each lane with m.
inline void multiply_wide(VecU a, uint32_t m, VecU& hi, VecU& lo) {
#if defined(__AVX512F__)
  const __m512i v = (__m512i)a, mm = _mm512_set1_epi32(static_cast<int>(m));
  const __m512i even = _mm512_mul_epu32(v, mm), odd = _mm512_mul_epu32(_mm512_srli_epi64(v, 32), mm);
  lo = (VecU)_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
  hi = (VecU)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
#elif defined(__AVX2__)
  const __m256i v = (__m256i)a, mm = _mm256_set1_epi32(static_cast<int>(m));
  const __m256i even = _mm256_mul_epu32(v, mm), odd = _mm256_mul_epu32(_mm256_srli_epi64(v, 32), mm);
  lo = (VecU)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  hi = (VecU)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = static_cast<uint64_t>(a[i]) * m;
    lo[i] = static_cast<uint32_t>(product);
    hi[i] = static_cast<uint32_t>(product >> 32);
  }
#endif
}

}  // namespace
}  // namespace lk::cpu
