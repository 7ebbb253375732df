// Packed weights, decoded on their way into a buffer or into a product.
// Included once per instruction set; LK_PACKED_TABLE names the table it defines. Compiled without contraction: a weight
// and a quantised scale are products that are rounded before anything is added to them, and fma() says where one is
// not.
#include "packed_weight.h"
#include "simd.h"

namespace lk::cpu {
namespace {

// ------------------------------------------------------------------------------------------- 16-bit types

typedef uint16_t VecH __attribute__((vector_size(LK_VECTOR_BYTES / 2)));

inline VecU select(VecU condition, VecU yes, VecU no) { return (condition & yes) | (~condition & no); }

// Lanes of all ones where a > b. No operand has its highest bit set.
inline VecU above(VecU a, uint32_t b) {
  typedef int32_t VecI __attribute__((vector_size(LK_VECTOR_BYTES)));
  return (VecU)((VecI)a > (VecI)broadcast(b));
}

// The bits of v in a 16-bit type, in the lower half of each lane: float_types.h says how.
template <FloatType kType>
inline VecU narrow_bits(VecF v);

template <>
inline VecU narrow_bits<FloatType::kBFloat16>(VecF v) {
  const VecU bits = (VecU)v, rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  return select(above(bits & 0x7FFFFFFFu, 0x7F800000u), broadcast(0x7FC0u), rounded);
}

template <>
inline VecU narrow_bits<FloatType::kFloat16>(VecF v) {
  constexpr uint32_t kRebias = 112u << 23, kSmallestNormal = 113u << 23, kOverflow = 0x477FF000u, kHalf = 0x3F000000u;
  const VecU bits = (VecU)v, sign = bits >> 16 & 0x8000u, body = bits & 0x7FFFFFFFu;
  const VecU normal = (body - kRebias + 0xFFFu + (body >> 13 & 1u)) >> 13;
  const VecU subnormal = (VecU)((VecF)body + 0.5f) - kHalf;
  VecU half = select(above(body, kSmallestNormal - 1), normal, subnormal);
  half = select(above(body, kOverflow - 1), broadcast(0x7C00u), half);
  half = select(above(body, 0x7F800000u), broadcast(0x7E00u), half);
  return sign | half;
}

template <FloatType kType>
inline VecF widen(VecU bits);

template <>
inline VecF widen<FloatType::kBFloat16>(VecU bits) {
  return (VecF)(bits << 16);
}

template <>
inline VecF widen<FloatType::kFloat16>(VecU bits) {
  constexpr uint32_t kRebias = 112u << 23, kInfinity = 0x1Fu << 23;
  typedef int32_t VecI __attribute__((vector_size(LK_VECTOR_BYTES)));
  const VecU sign = (bits & 0x8000u) << 16, body = (bits & 0x7FFFu) << 13;
  const VecU normal = body + kRebias + (above(body, kInfinity - 1) & kRebias);
  const VecU subnormal = (VecU)(__builtin_convertvector((VecI)(bits & 0x3FFu), VecF) * 0x1p-24f);
  return (VecF)(sign | select(above(body, (1u << 23) - 1), normal, subnormal));
}

template <FloatType kRounding>
inline VecF rounded(VecF v) {
  if constexpr (kRounding == FloatType::kFloat32) {
    return v;
  } else {
    return widen<kRounding>(narrow_bits<kRounding>(v));
  }
}

// ------------------------------------------------------------------------------------------------- scales

inline float scale_of(const PackedWeight& w, int64_t block) {
  if (w.indices == nullptr) return w.scales[block];
  const float product = w.code2[w.indices[block]] * w.scales2[block / kScalesBlock];
  return product + w.offset;
}

// -------------------------------------------------------------------------------------- codes, in order

constexpr int kRun = 32;  // weights that are decoded at a time
constexpr int kRunVectors = kRun / kLanes;

// The code of kRun consecutive weights, of 16 bytes.
class Codes {
 public:
#if defined(__AVX512F__)
  explicit Codes(const float* code) : table_(_mm512_loadu_ps(code)) {}

  inline void operator()(const uint8_t* bytes, VecF* out) const {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    // A permutation looks at the lowest four bits of an index.
    const __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), table_);
    const __m512 odd = _mm512_permutexvar_ps(wide, table_);
    out[0] = (VecF)_mm512_permutex2var_ps(even, first, odd);
    out[1] = (VecF)_mm512_permutex2var_ps(even, second, odd);
  }

 private:
  __m512 table_;
#elif defined(__AVX2__)
  // pshufb looks up 16 entries of one byte: a code is put together from its four bytes.
  explicit Codes(const float* code) {
    for (int b = 0; b < 4; ++b) {
      alignas(16) uint8_t plane[16];
      for (int i = 0; i < 16; ++i) {
        uint32_t bits;
        memcpy(&bits, code + i, sizeof bits);
        plane[i] = static_cast<uint8_t>(bits >> 8 * b);
      }
      planes_[b] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(plane)));
    }
  }

  inline void operator()(const uint8_t* bytes, VecF* out) const {
    const __m128i mask = _mm_set1_epi8(15), both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    const __m128i even = _mm_and_si128(_mm_srli_epi16(both, 4), mask), odd = _mm_and_si128(both, mask);
    const __m128 lower = _mm_castsi128_ps(_mm_unpacklo_epi8(even, odd));  // weights 0 to 15
    const __m128 upper = _mm_castsi128_ps(_mm_unpackhi_epi8(even, odd));
    // unpack works within halves: fours of weights that are to lie in the lower half of a vector go into that half.
    const __m128i low = _mm_castps_si128(_mm_shuffle_ps(lower, upper, 0x88));
    const __m128i high = _mm_castps_si128(_mm_shuffle_ps(lower, upper, 0xDD));
    look_up(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1), out);
  }

 private:
  // The codes of 32 indices: vector j is of bytes 4j to 4j + 3 of either half.
  inline void look_up(__m256i index, VecF* out) const {
    const __m256i p0 = _mm256_shuffle_epi8(planes_[0], index), p1 = _mm256_shuffle_epi8(planes_[1], index);
    const __m256i p2 = _mm256_shuffle_epi8(planes_[2], index), p3 = _mm256_shuffle_epi8(planes_[3], index);
    const __m256i a = _mm256_unpacklo_epi8(p0, p1), b = _mm256_unpacklo_epi8(p2, p3);
    const __m256i c = _mm256_unpackhi_epi8(p0, p1), d = _mm256_unpackhi_epi8(p2, p3);
    out[0] = (VecF)_mm256_unpacklo_epi16(a, b);
    out[1] = (VecF)_mm256_unpackhi_epi16(a, b);
    out[2] = (VecF)_mm256_unpacklo_epi16(c, d);
    out[3] = (VecF)_mm256_unpackhi_epi16(c, d);
  }

  __m256i planes_[4];
#else
  explicit Codes(const float* code) : table_(code) {}

  inline void operator()(const uint8_t* bytes, VecF* out) const {
    float codes[kRun];
    for (int i = 0; i < kRun / 2; ++i) {
      codes[2 * i] = table_[bytes[i] >> 4];
      codes[2 * i + 1] = table_[bytes[i] & 15];
    }
    for (int v = 0; v < kRunVectors; ++v) out[v] = load(codes + v * kLanes);
  }

 private:
  const float* table_;
#endif
};

// ------------------------------------------------------------------------------------------------- unpack

template <FloatType kRounding, class Out>
inline void unpack_run(const Codes& codes, const uint8_t* bytes, VecF scale, Out* out) {
  VecF w[kRunVectors];
  codes(bytes, w);
  for (int v = 0; v < kRunVectors; ++v) {
    if constexpr (sizeof(Out) == sizeof(float)) {
      store(out + v * kLanes, rounded<kRounding>(w[v] * scale));
    } else {
      const VecH half = __builtin_convertvector(narrow_bits<kRounding>(w[v] * scale), VecH);
      memcpy(out + v * kLanes, &half, sizeof half);
    }
  }
}

template <FloatType kRounding, class Out>
void unpack(const UnpackParams& p, int64_t begin, int64_t end) {
  const PackedWeight& w = p.weight;
  const Codes codes(w.code);
  Out* out = static_cast<Out*>(p.out) + (begin - p.first_row) * w.k;
  const uint8_t* bytes = w.data + begin * w.k / 2;
  for (int64_t block = begin * w.k / w.block; block < end * w.k / w.block; ++block) {
    const VecF scale = broadcast(scale_of(w, block));
    int64_t c = 0;
    for (; c + kRun <= w.block; c += kRun) unpack_run<kRounding>(codes, bytes + c / 2, scale, out + c);
    if (c < w.block) {  // a block that ends within a run
      uint8_t last[kRun / 2] = {};
      Out decoded[kRun];
      memcpy(last, bytes + c / 2, (w.block - c) / 2);
      unpack_run<kRounding>(codes, last, scale, decoded);
      memcpy(out + c, decoded, sizeof(Out) * (w.block - c));
    }
    out += w.block;
    bytes += w.block / 2;
  }
}

void unpack_any(const UnpackParams& p, int64_t begin, int64_t end) {
  switch (p.weight.rounding) {
    case FloatType::kBFloat16:
      return (p.is_narrow ? unpack<FloatType::kBFloat16, uint16_t> : unpack<FloatType::kBFloat16, float>)(p, begin,
                                                                                                          end);
    case FloatType::kFloat16:
      return (p.is_narrow ? unpack<FloatType::kFloat16, uint16_t> : unpack<FloatType::kFloat16, float>)(p, begin, end);
    default:
      return unpack<FloatType::kFloat32, float>(p, begin, end);
  }
}

}  // namespace

extern const PackedWeightKernels LK_PACKED_TABLE;
const PackedWeightKernels LK_PACKED_TABLE = {
    .unpack = unpack_any,
};

}  // namespace lk::cpu
