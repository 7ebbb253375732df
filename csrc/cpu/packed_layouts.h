// How packed weights are decoded, by layout. A part of packed_weight.inl, which says how it is compiled.
//
// A layout is a type that is made of a weight, once for many runs. It has
//   kBits: of a weight in memory;
//   weight_of(vector, lane): which weight of a run `in_any_order` has in this lane;
//   Run<kRounding, Out>: decodes runs that share a scale, with
//     kLacksScale: whether `in_any_order` gives numbers that the scale is still to multiply;
//     in_order(bytes, out): the weights of a run, in fp32 or, where Out is uint16_t, in the type they are rounded to;
//     in_any_order(bytes, f): calls f(vector, weights) for each vector, in fp32.
#pragma once

#include "packed_weight.h"
#include "simd.h"

namespace lk::cpu {
namespace {

constexpr int kRun = 32;  // weights that are decoded at a time
constexpr int kRunVectors = kRun / kLanes;

// ------------------------------------------------------------------------------------------- 16-bit types

typedef uint16_t VecH __attribute__((vector_size(LK_VECTOR_BYTES / 2)));
typedef uint16_t VecW __attribute__((vector_size(LK_VECTOR_BYTES)));
typedef int32_t VecI __attribute__((vector_size(LK_VECTOR_BYTES)));

// To bf16, as an fp32 number: narrowing and widening take longer.
inline VecF rounded_to_bf16(VecF v) {
  const VecU bits = (VecU)v, nearest = (bits + 0x7FFFu + (bits >> 16 & 1u)) & 0xFFFF0000u;
  return (VecF)(v != v ? broadcast(0x7FC00000u) : nearest);
}

inline VecH narrow_to_bf16(VecF v) {
#if defined(__AVX512BF16__)
  constexpr int kSubnormal = 0x20;  // which the instruction takes for zero
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)v, kSubnormal) == 0, 1)) {
    return (VecH)_mm512_cvtneps_pbh((__m512)v);
  }
#endif
  return __builtin_convertvector((VecU)rounded_to_bf16(v) >> 16, VecH);
}

// To fp16 and back, subnormals included, whatever the thread flushes to zero.
#if defined(__AVX512F__)
inline VecH narrow_to_fp16(VecF v) { return (VecH)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
inline VecF widened(VecH half) { return (VecF)_mm512_cvtph_ps((__m256i)half); }
#elif defined(__AVX2__)
inline VecH narrow_to_fp16(VecF v) { return (VecH)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
inline VecF widened(VecH half) { return (VecF)_mm256_cvtph_ps((__m128i)half); }
#else
// Lanes of all ones where a > b. No operand has its highest bit set.
inline VecI above(VecU a, uint32_t b) { return (VecI)a > (VecI)broadcast(b); }

// As float_types.h does it.
inline VecH narrow_to_fp16(VecF v) {
  constexpr uint32_t kRebias = 112u << 23, kSmallestNormal = 113u << 23, kOverflow = 0x477FF000u, kHalf = 0x3F000000u;
  const VecU bits = (VecU)v, sign = bits >> 16 & 0x8000u, body = bits & 0x7FFFFFFFu;
  const VecU normal = (body - kRebias + 0xFFFu + (body >> 13 & 1u)) >> 13;
  const VecU subnormal = (VecU)((VecF)body + 0.5f) - kHalf;
  VecU half = above(body, kSmallestNormal - 1) ? normal : subnormal;
  half = above(body, kOverflow - 1) ? broadcast(0x7C00u) : half;
  half = above(body, 0x7F800000u) ? broadcast(0x7E00u) : half;
  return __builtin_convertvector(sign | half, VecH);
}

inline VecF widened(VecH half) {
  constexpr uint32_t kRebias = 112u << 23, kInfinity = 0x1Fu << 23;
  const VecU bits = __builtin_convertvector(half, VecU);
  const VecU sign = (bits & 0x8000u) << 16, body = (bits & 0x7FFFu) << 13;
  const VecU normal = body + kRebias + ((VecU)above(body, kInfinity - 1) & kRebias);
  const VecU subnormal = (VecU)(__builtin_convertvector((VecI)(bits & 0x3FFu), VecF) * 0x1p-24f);
  return (VecF)(sign | (above(body, (1u << 23) - 1) ? normal : subnormal));
}
#endif

template <FloatType kRounding>
inline VecF rounded(VecF v) {
  if constexpr (kRounding == FloatType::kBFloat16) return rounded_to_bf16(v);
  if constexpr (kRounding == FloatType::kFloat16) return widened(narrow_to_fp16(v));
  return v;
}

// To a 16-bit type.
template <FloatType kRounding>
inline VecH narrow(VecF v) {
  if constexpr (kRounding == FloatType::kFloat16) return narrow_to_fp16(v);
  return narrow_to_bf16(v);
}

template <FloatType kRounding>
inline void store_rounded(float* out, VecF v) {
  store(out, rounded<kRounding>(v));
}

template <FloatType kRounding>
inline void store_rounded(uint16_t* out, VecF v) {
  const VecH half = narrow<kRounding>(v);
  memcpy(out, &half, sizeof half);
}

// ------------------------------------------------------------------------------------------------- codes4

constexpr int kCodes = 16, kCodeVectors = kCodes / kLanes;

// A table of the 16 weights that a scale makes of the codes: what multiplies and rounds is done once for each of them,
// and not for each weight of the block. kLowFirst: the even weights are in the low halves of their bytes.
template <bool kLowFirst, FloatType kRounding, class Out>
class Codes4Run;

#if defined(__AVX512F__) || !defined(__AVX2__)
struct Codes {
  explicit Codes(const float* code) {
    for (int v = 0; v < kCodeVectors; ++v) vector[v] = load(code + v * kLanes);
  }

  VecF vector[kCodeVectors];
};
#endif

#if defined(__AVX512F__)
// Of eight weights to a word, and four words: each quarter of a vector holds other weights of theirs.
template <bool kLowFirst>
constexpr int codes4_weight_of(int vector, int lane) {
  const int nibble = lane / 4 + 4 * vector;
  return 8 * (lane % 4) + (kLowFirst ? nibble : nibble ^ 1);
}

inline __m128i load_16_bytes(const uint8_t* bytes) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)); }

// A permutation looks at the lowest four bits of an index.
template <bool kLowFirst, FloatType kRounding>
class Codes4Run<kLowFirst, kRounding, float> {
 public:
  static constexpr bool kLacksScale = false;

  Codes4Run(const Codes& codes, VecF scale) : table_((__m512)rounded<kRounding>(codes.vector[0] * scale)) {}

  LK_ALWAYS_INLINE inline void in_order(const uint8_t* bytes, float* out) const {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    const __m512i low = _mm512_cvtepu8_epi32(load_16_bytes(bytes)), high = _mm512_srli_epi32(low, 4);
    const __m512 even = _mm512_permutexvar_ps(kLowFirst ? low : high, table_);
    const __m512 odd = _mm512_permutexvar_ps(kLowFirst ? high : low, table_);
    _mm512_storeu_ps(out, _mm512_permutex2var_ps(even, first, odd));
    _mm512_storeu_ps(out + kLanes, _mm512_permutex2var_ps(even, second, odd));
  }

  template <class F>
  LK_ALWAYS_INLINE inline void in_any_order(const uint8_t* bytes, const F& f) const {
    const __m512i words = _mm512_broadcast_i32x4(load_16_bytes(bytes));
    const __m512i first = _mm512_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12);
    const __m512i second = _mm512_setr_epi32(16, 16, 16, 16, 20, 20, 20, 20, 24, 24, 24, 24, 28, 28, 28, 28);
    f(0, (VecF)_mm512_permutexvar_ps(_mm512_srlv_epi32(words, first), table_));
    f(1, (VecF)_mm512_permutexvar_ps(_mm512_srlv_epi32(words, second), table_));
  }

 private:
  __m512 table_;
};

// The same with five bits, of which the fifth is any: both halves hold the table.
template <bool kLowFirst, FloatType kRounding>
class Codes4Run<kLowFirst, kRounding, uint16_t> {
 public:
  Codes4Run(const Codes& codes, VecF scale)
      : table_(_mm512_broadcast_i64x4((__m256i)narrow<kRounding>(codes.vector[0] * scale))) {}

  LK_ALWAYS_INLINE inline void in_order(const uint8_t* bytes, uint16_t* out) const {
    _mm512_storeu_si512(out, in_order(bytes));
  }

  inline __m512i in_order(const uint8_t* bytes) const {
    const __m512i wide = _mm512_cvtepu8_epi32(load_16_bytes(bytes));
    const __m512i even = kLowFirst ? wide : _mm512_srli_epi32(wide, 4);
    const __m512i odd = _mm512_slli_epi32(wide, kLowFirst ? 12 : 16);
    return _mm512_permutexvar_epi16(_mm512_or_si512(even, odd), table_);
  }

 private:
  __m512i table_;
};
#elif defined(__AVX2__)
// The even weights of four bytes, then the odd ones.
template <bool kLowFirst>
constexpr int codes4_weight_of(int vector, int lane) {
  return 2 * (4 * vector + lane % 4) + lane / 4;
}

inline __m256i joined(__m128i low, __m128i high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

// The indices of 32 weights, the even ones in the lower half.
template <bool kLowFirst>
inline __m256i split_nibbles(const uint8_t* bytes) {
  const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  const __m256i shifts =
      kLowFirst ? _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4) : _mm256_setr_epi32(4, 4, 4, 4, 0, 0, 0, 0);
  return _mm256_and_si256(_mm256_srlv_epi32(both, shifts), _mm256_set1_epi8(15));
}

// Those of weights 0 to 15, and of 16 to 31.
template <bool kLowFirst>
inline void ordered_nibbles(const uint8_t* bytes, __m128i& lower, __m128i& upper) {
  const __m256i split = split_nibbles<kLowFirst>(bytes);
  const __m128i even = _mm256_castsi256_si128(split), odd = _mm256_extracti128_si256(split, 1);
  lower = _mm_unpacklo_epi8(even, odd);
  upper = _mm_unpackhi_epi8(even, odd);
}

// pshufb looks up 16 entries of one byte: a number is put together from its four bytes. The lower ones of numbers that
// are rounded to 16 bits are zero.
class BytePlanes {
 public:
  BytePlanes(VecF lower, VecF upper) {
    const __m256i by_byte =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i even = _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5), odd = _mm256_setr_epi32(2, 6, 3, 7, 2, 6, 3, 7);
    const __m256i a = _mm256_shuffle_epi8((__m256i)lower, by_byte), b = _mm256_shuffle_epi8((__m256i)upper, by_byte);
    const __m256i low = _mm256_unpacklo_epi32(a, b), high = _mm256_unpackhi_epi32(a, b);
    planes_[0] = _mm256_permutevar8x32_epi32(low, even);
    planes_[1] = _mm256_permutevar8x32_epi32(low, odd);
    planes_[2] = _mm256_permutevar8x32_epi32(high, even);
    planes_[3] = _mm256_permutevar8x32_epi32(high, odd);
  }

  // Calls f(vector, numbers): vector j is of bytes 4j to 4j + 3 of either half.
  template <FloatType kRounding, class F>
  LK_ALWAYS_INLINE inline void look_up(__m256i index, const F& f) const {
    const __m256i p2 = _mm256_shuffle_epi8(planes_[2], index), p3 = _mm256_shuffle_epi8(planes_[3], index);
    __m256i a = _mm256_setzero_si256(), c = a;
    if constexpr (kRounding != FloatType::kBFloat16) {
      const __m256i p0 = kRounding == FloatType::kFloat16 ? a : _mm256_shuffle_epi8(planes_[0], index);
      const __m256i p1 = _mm256_shuffle_epi8(planes_[1], index);
      a = _mm256_unpacklo_epi8(p0, p1);
      c = _mm256_unpackhi_epi8(p0, p1);
    }
    const __m256i b = _mm256_unpacklo_epi8(p2, p3), d = _mm256_unpackhi_epi8(p2, p3);
    f(0, (VecF)_mm256_unpacklo_epi16(a, b));
    f(1, (VecF)_mm256_unpackhi_epi16(a, b));
    f(2, (VecF)_mm256_unpacklo_epi16(c, d));
    f(3, (VecF)_mm256_unpackhi_epi16(c, d));
  }

 private:
  __m256i planes_[4];
};

struct Codes {
  explicit Codes(const float* code) : vector{load(code), load(code + kLanes)}, planes(vector[0], vector[1]) {}

  VecF vector[kCodeVectors];
  BytePlanes planes;
};

// Planes take about as long as multiplying 64 weights: they are made per scale where that saves the rounding, too.
template <FloatType kRounding>
struct ScaledPlanes {
  static constexpr bool kLacksScale = false;

  ScaledPlanes(const Codes& codes, VecF scale)
      : planes(rounded<kRounding>(codes.vector[0] * scale), rounded<kRounding>(codes.vector[1] * scale)) {}

  BytePlanes planes;
};

template <>
struct ScaledPlanes<FloatType::kFloat32> {
  static constexpr bool kLacksScale = true;

  ScaledPlanes(const Codes& codes, VecF) : planes(codes.planes) {}

  const BytePlanes& planes;
};

template <bool kLowFirst, FloatType kRounding>
class Codes4Run<kLowFirst, kRounding, float> {
 public:
  static constexpr bool kLacksScale = ScaledPlanes<kRounding>::kLacksScale;

  Codes4Run(const Codes& codes, VecF scale) : table_(codes, scale), scale_(scale) {}

  LK_ALWAYS_INLINE inline void in_order(const uint8_t* bytes, float* out) const {
    __m128i lower, upper;
    ordered_nibbles<kLowFirst>(bytes, lower, upper);
    // unpack works within halves: fours of weights that are to lie in the lower half of a vector go into that half.
    const __m128 a = _mm_castsi128_ps(lower), b = _mm_castsi128_ps(upper);
    table_.planes.template look_up<kRounding>(
        joined(_mm_castps_si128(_mm_shuffle_ps(a, b, 0x88)), _mm_castps_si128(_mm_shuffle_ps(a, b, 0xDD))),
        [&](int v, VecF w) LK_ALWAYS_INLINE { store(out + v * kLanes, kLacksScale ? w * scale_ : w); });
  }

  template <class F>
  LK_ALWAYS_INLINE inline void in_any_order(const uint8_t* bytes, const F& f) const {
    table_.planes.template look_up<kRounding>(split_nibbles<kLowFirst>(bytes), f);
  }

 private:
  ScaledPlanes<kRounding> table_;
  VecF scale_;
};

template <bool kLowFirst, FloatType kRounding>
class Codes4Run<kLowFirst, kRounding, uint16_t> {
 public:
  Codes4Run(const Codes& codes, VecF scale) {
    const __m256i by_byte =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    const __m256i table = joined((__m128i)narrow<kRounding>(codes.vector[0] * scale),
                                 (__m128i)narrow<kRounding>(codes.vector[1] * scale));
    const __m256i split = _mm256_shuffle_epi8(table, by_byte);
    low_ = _mm256_permute4x64_epi64(split, 0x88);
    high_ = _mm256_permute4x64_epi64(split, 0xDD);
  }

  LK_ALWAYS_INLINE inline void in_order(const uint8_t* bytes, uint16_t* out) const {
    __m128i lower, upper;
    ordered_nibbles<kLowFirst>(bytes, lower, upper);
    // Here, eights of weights.
    const __m256i index = joined(_mm_unpacklo_epi64(lower, upper), _mm_unpackhi_epi64(lower, upper));
    const __m256i low = _mm256_shuffle_epi8(low_, index), high = _mm256_shuffle_epi8(high_, index);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi8(low, high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + kRun / 2), _mm256_unpackhi_epi8(low, high));
  }

 private:
  __m256i low_, high_;
};
#else
template <bool kLowFirst>
constexpr int codes4_weight_of(int vector, int lane) {
  return vector * kLanes + lane;
}

template <bool kLowFirst, FloatType kRounding, class Out>
class Codes4Run {
 public:
  static constexpr bool kLacksScale = false;

  Codes4Run(const Codes& codes, VecF scale) {
    for (int v = 0; v < kCodeVectors; ++v) store_rounded<kRounding>(table_ + v * kLanes, codes.vector[v] * scale);
  }

  LK_ALWAYS_INLINE inline void in_order(const uint8_t* bytes, Out* out) const {
    for (int i = 0; i < kRun / 2; ++i) {
      const Out high = table_[bytes[i] >> 4], low = table_[bytes[i] & 15];
      out[2 * i] = kLowFirst ? low : high;
      out[2 * i + 1] = kLowFirst ? high : low;
    }
  }

  template <class F>
  LK_ALWAYS_INLINE inline void in_any_order(const uint8_t* bytes, const F& f) const {
    float w[kRun];
    in_order(bytes, w);
    for (int v = 0; v < kRunVectors; ++v) f(v, load(w + v * kLanes));
  }

 private:
  Out table_[kCodes];
};
#endif

template <bool kLowFirst>
class Codes4 {
 public:
  static constexpr int kBits = 4;

  static constexpr int weight_of(int vector, int lane) { return codes4_weight_of<kLowFirst>(vector, lane); }

  explicit Codes4(const PackedWeight& w) : codes_(w.code) {}

  template <FloatType kRounding, class Out>
  class Run : public Codes4Run<kLowFirst, kRounding, Out> {
   public:
    Run(const Codes4& layout, float scale) : Codes4Run<kLowFirst, kRounding, Out>(layout.codes_, broadcast(scale)) {}
  };

 private:
  Codes codes_;
};

// -------------------------------------------------------------------------------------------- int8, e4m3

struct Int8Numbers {
  static inline void read(const uint8_t* bytes, VecF* out) {
    for (int v = 0; v < kRunVectors; ++v, bytes += kLanes) {
#if defined(__AVX512F__)
      const VecI wide = (VecI)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
#elif defined(__AVX2__)
      const VecI wide = (VecI)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
#else
      VecI wide;
      for (int i = 0; i < kLanes; ++i) wide[i] = static_cast<int8_t>(bytes[i]);
#endif
      out[v] = __builtin_convertvector(wide, VecF);
    }
  }
};

// One bit of sign, four of exponent, of bias 7, three of mantissa; all ones but the sign are the only NaN. Shifted into
// fp16's places, they are the number by the difference of the biases, subnormals, too.
struct E4m3Numbers {
  static inline void read(const uint8_t* bytes, VecF* out) {
    for (int v = 0; v < kRunVectors; v += 2, bytes += 2 * kLanes) {
      VecW words;  // with the sign in all higher bits
#if defined(__AVX512F__)
      words = (VecW)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
#elif defined(__AVX2__)
      words = (VecW)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
#else
      for (int i = 0; i < 2 * kLanes; ++i) words[i] = static_cast<uint16_t>(static_cast<int8_t>(bytes[i]));
#endif
      words = words << 7 & 0xBF80;
      words |= (words + 0x0080) & 0x4000;  // a carry out of all ones: an exponent of NaN
      VecH half[2];
      memcpy(half, &words, sizeof half);
      for (int i = 0; i < 2; ++i) out[v + i] = widened(half[i]) * 0x1p8f;
    }
  }
};

template <class Numbers>
class Scaled {
 public:
  static constexpr int kBits = 8;

  static constexpr int weight_of(int vector, int lane) { return vector * kLanes + lane; }

  explicit Scaled(const PackedWeight&) {}

  template <FloatType kRounding, class Out>
  class Run {
   public:
    static constexpr bool kLacksScale = kRounding == FloatType::kFloat32;

    Run(const Scaled&, float scale) : scale_(broadcast(scale)) {}

    inline void in_order(const uint8_t* bytes, Out* out) const {
      VecF w[kRunVectors];
      Numbers::read(bytes, w);
      for (int v = 0; v < kRunVectors; ++v) store_rounded<kRounding>(out + v * kLanes, w[v] * scale_);
    }

    template <class F>
    inline void in_any_order(const uint8_t* bytes, const F& f) const {
      VecF w[kRunVectors];
      Numbers::read(bytes, w);
      for (int v = 0; v < kRunVectors; ++v) f(v, kLacksScale ? w[v] : rounded<kRounding>(w[v] * scale_));
    }

   private:
    VecF scale_;
  };
};

// ------------------------------------------------------------------------------------------------- choice

template <class Type, FloatType kRoundingOf>
struct Kind {
  using Layout = Type;
  static constexpr FloatType kRounding = kRoundingOf;
};

template <class Layout, class F>
inline auto with_rounding(const PackedWeight& w, const F& f) {
  switch (w.rounding) {
    case FloatType::kBFloat16:
      return f(Kind<Layout, FloatType::kBFloat16>{});
    case FloatType::kFloat16:
      return f(Kind<Layout, FloatType::kFloat16>{});
    default:
      return f(Kind<Layout, FloatType::kFloat32>{});
  }
}

// Calls f(Kind) for the layout and the rounding of a weight.
template <class F>
inline auto with_kind(const PackedWeight& w, const F& f) {
  switch (w.layout) {
    case PackedLayout::kCodes4:
      return with_rounding<Codes4<false>>(w, f);
    case PackedLayout::kCodes4Low:
      return with_rounding<Codes4<true>>(w, f);
    case PackedLayout::kInt8:
      return with_rounding<Scaled<Int8Numbers>>(w, f);
    default:
      return with_rounding<Scaled<E4m3Numbers>>(w, f);
  }
}

}  // namespace
}  // namespace lk::cpu
