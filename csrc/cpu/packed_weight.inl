// Packed weights, decoded on their way into a buffer or into a product.
// Included once per instruction set; LK_PACKED_TABLE names the table it defines. Compiled without contraction: a weight
// and a quantised scale are products that are rounded before anything is added to them, and fma() says where one is
// not.
#include "packed_weight.h"
#include "simd.h"

namespace lk::cpu {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline VecF fma(VecF a, VecF b, VecF c) {
#if defined(__AVX512F__)
  return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FP_FAST_FMAF)
  for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}

// The first `count` of kLanes numbers, then zeros; nothing behind them is read.
inline VecF load_first(const float* p, int64_t count) {
  if (count >= kLanes) return load(p);
#if defined(__AVX512F__)
  return (VecF)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
#else
  VecF v = {};
  for (int i = 0; i < count; ++i) v[i] = p[i];
  return v;
#endif
}

// The sums of four vectors.
inline void sum_four(const VecF* v, float* out) {
#if defined(__AVX2__)
  __m256 half[4];
  for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
    const __m512 whole = (__m512)v[i];
    half[i] = _mm256_add_ps(_mm512_castps512_ps256(whole),
                            _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(whole), 1)));
#else
    half[i] = (__m256)v[i];
#endif
  }
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
#else
  for (int i = 0; i < 4; ++i) out[i] = sum(v[i]);
#endif
}

// ------------------------------------------------------------------------------------------- 16-bit types

typedef uint16_t VecH __attribute__((vector_size(LK_VECTOR_BYTES / 2)));
typedef int32_t VecI __attribute__((vector_size(LK_VECTOR_BYTES)));

// Lanes of all ones where a > b. No operand has its highest bit set.
inline VecI above(VecU a, uint32_t b) { return (VecI)a > (VecI)broadcast(b); }

// To bf16, as an fp32 number.
inline VecF rounded_to_bf16(VecF v) {
  const VecU bits = (VecU)v, nearest = (bits + 0x7FFFu + (bits >> 16 & 1u)) & 0xFFFF0000u;
  return (VecF)(v != v ? broadcast(0x7FC00000u) : nearest);
}

// The bits of v in a 16-bit type, in the lower half of each lane: float_types.h says how.
template <FloatType kType>
inline VecU narrow_bits(VecF v);

template <>
inline VecU narrow_bits<FloatType::kBFloat16>(VecF v) {
  return (VecU)rounded_to_bf16(v) >> 16;
}

template <>
inline VecU narrow_bits<FloatType::kFloat16>(VecF v) {
  constexpr uint32_t kRebias = 112u << 23, kSmallestNormal = 113u << 23, kOverflow = 0x477FF000u, kHalf = 0x3F000000u;
  const VecU bits = (VecU)v, sign = bits >> 16 & 0x8000u, body = bits & 0x7FFFFFFFu;
  const VecU normal = (body - kRebias + 0xFFFu + (body >> 13 & 1u)) >> 13;
  const VecU subnormal = (VecU)((VecF)body + 0.5f) - kHalf;
  VecU half = above(body, kSmallestNormal - 1) ? normal : subnormal;
  half = above(body, kOverflow - 1) ? broadcast(0x7C00u) : half;
  half = above(body, 0x7F800000u) ? broadcast(0x7E00u) : half;
  return sign | half;
}

// fp16 bits as fp32 numbers.
inline VecF widened(VecU bits) {
  constexpr uint32_t kRebias = 112u << 23, kInfinity = 0x1Fu << 23;
  const VecU sign = (bits & 0x8000u) << 16, body = (bits & 0x7FFFu) << 13;
  const VecU normal = body + kRebias + ((VecU)above(body, kInfinity - 1) & kRebias);
  const VecU subnormal = (VecU)(__builtin_convertvector((VecI)(bits & 0x3FFu), VecF) * 0x1p-24f);
  return (VecF)(sign | (above(body, (1u << 23) - 1) ? normal : subnormal));
}

template <FloatType kRounding>
inline VecF rounded(VecF v) {
  if constexpr (kRounding == FloatType::kBFloat16) return rounded_to_bf16(v);
  if constexpr (kRounding == FloatType::kFloat16) return widened(narrow_bits<kRounding>(v));
  return v;
}

// ------------------------------------------------------------------------------------------------- scales

inline float scale_of(const PackedWeight& w, int64_t block) {
  if (w.indices == nullptr) return w.scales[block];
  const float product = w.code2[w.indices[block]] * w.scales2[block / kScalesBlock];
  return product + w.offset;
}

// The scales of `count` blocks; up to kLanes numbers more may be written.
inline void read_scales(const PackedWeight& w, int64_t first, int64_t count, float* out) {
  if (w.indices == nullptr) {
    for (int64_t i = 0; i < count; i += kLanes) store(out + i, load_first(w.scales + first + i, count - i));
    return;
  }
  const float* code2 = w.code2;
  const float offset = w.offset;
  for (int64_t i = 0; i < count;) {
    const float scale2 = w.scales2[(first + i) / kScalesBlock];
    const uint8_t* indices = w.indices + first;
    const int64_t end = smaller(count, i + kScalesBlock - (first + i) % kScalesBlock);
    for (; i < end; ++i) {
      const float product = code2[indices[i]] * scale2;
      out[i] = product + offset;
    }
  }
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

 private:
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

// Columns [begin, end) of row n of W, both even.
template <FloatType kRounding, class Out>
inline void unpack_columns(const PackedWeight& w, const Codes& codes, int64_t n, int64_t begin, int64_t end, Out* out) {
  int64_t block = (n * w.k + begin) / w.block, block_end = begin - begin % w.block;
  const uint8_t* bytes = w.data + (n * w.k + begin) / 2;
  for (int64_t c = begin; c < end; ++block) {
    const VecF scale = broadcast(scale_of(w, block));
    block_end = smaller(block_end + w.block, end);
    for (; c + kRun <= block_end; c += kRun, out += kRun, bytes += kRun / 2) {
      unpack_run<kRounding>(codes, bytes, scale, out);
    }
    if (c < block_end) {  // a block that ends within a run
      const int64_t left = block_end - c;
      uint8_t last[kRun / 2] = {};
      Out decoded[kRun];
      memcpy(last, bytes, left / 2);
      unpack_run<kRounding>(codes, last, scale, decoded);
      memcpy(out, decoded, sizeof(Out) * left);
      c = block_end;
      out += left;
      bytes += left / 2;
    }
  }
}

template <FloatType kRounding, class Out>
void unpack(const UnpackParams& p, int64_t begin, int64_t end) {
  const Codes codes(p.weight.code);
  const int64_t k = p.weight.k;
  for (int64_t n = begin; n < end; ++n) {
    unpack_columns<kRounding>(p.weight, codes, n, 0, k, static_cast<Out*>(p.out) + (n - p.first_row) * k);
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

// ------------------------------------------------------------------------------------------------- decode

// The codes of kGroup consecutive weights in an order that takes no shuffles: see weight_of.
class GroupCodes {
 public:
#if defined(__AVX512F__)
  static constexpr int kGroup = 128;

  // Lane l of all vectors is of eight weights in a row, of one 32-bit word.
  static constexpr int weight_of(int vector, int lane) { return 8 * lane + (vector ^ 1); }
  static constexpr int first_weight_of(int lane) { return 8 * lane; }

  explicit GroupCodes(const float* code) : table_(_mm512_loadu_ps(code)) {}

  // Calls f(vector, codes); weights from `count` on have any code. `count` is a multiple of 32.
  template <class F>
  inline void operator()(const uint8_t* bytes, int64_t count, const F& f) const {
    const __m512i words = count >= kGroup
                              ? _mm512_loadu_si512(bytes)
                              : _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << count / 8) - 1), bytes);
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) {
      f(v, (VecF)_mm512_permutexvar_ps((__m512i)((VecU)words >> 4 * v), table_));
    }
  }

 private:
  __m512 table_;
#elif defined(__AVX2__)
  static constexpr int kGroup = 64;

  // Even weights, then odd ones, of 32 bytes; Codes::look_up says which are in a vector.
  static constexpr int weight_of(int vector, int lane) {
    const int byte = 4 * (vector % 4) + lane % 4 + lane / 4 * 16;
    return 2 * byte + vector / 4;
  }
  static constexpr int first_weight_of(int lane) { return lane / 4 * 32; }

  explicit GroupCodes(const float* code) : codes_(code) {}

  template <class F>
  inline void operator()(const uint8_t* bytes, int64_t count, const F& f) const {
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i both = count >= kGroup
                             ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes))
                             : _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    VecF codes[4];
    codes_.look_up(_mm256_and_si256(_mm256_srli_epi16(both, 4), mask), codes);
    for (int v = 0; v < 4; ++v) f(v, codes[v]);
    codes_.look_up(_mm256_and_si256(both, mask), codes);
    for (int v = 0; v < 4; ++v) f(4 + v, codes[v]);
  }

 private:
  Codes codes_;
#else
  static constexpr int kGroup = kRun;

  static constexpr int weight_of(int vector, int lane) { return vector * kLanes + lane; }
  static constexpr int first_weight_of(int) { return 0; }

  explicit GroupCodes(const float* code) : codes_(code) {}

  template <class F>
  inline void operator()(const uint8_t* bytes, int64_t, const F& f) const {
    VecF codes[kRunVectors];
    codes_(bytes, codes);
    for (int v = 0; v < kRunVectors; ++v) f(v, codes[v]);
  }

 private:
  Codes codes_;
#endif
};

constexpr int kGroup = GroupCodes::kGroup;

int64_t arranged_width(int64_t k) { return (k + kGroup - 1) / kGroup * kGroup; }

void arrange_x(const float* x, int64_t k, float* arranged) {
  for (int64_t g = 0; g < k; g += kGroup) {
    for (int v = 0; v < kGroup / kLanes; ++v) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t column = g + GroupCodes::weight_of(v, lane);
        arranged[g + v * kLanes + lane] = column < k ? x[column] : 0.0f;
      }
    }
  }
}

// The scales of the lanes of a group.
class LaneScales {
 public:
  explicit LaneScales(int64_t block) : shift_(__builtin_ctzll(block)) {
    for (int lane = 0; lane < kLanes; ++lane) {
      index_[lane] = block < kGroup ? static_cast<uint32_t>(GroupCodes::first_weight_of(lane) >> shift_) : 0;
    }
  }

  int64_t block_of(int64_t weight) const { return weight >> shift_; }
  int64_t blocks(int64_t columns) const { return (columns + (int64_t{1} << shift_) - 1) >> shift_; }

  // `scales` begin with a block that column 0 is the first of; kLanes of them are read.
  inline VecF operator()(const float* scales, int64_t column) const {
    const float* first = scales + (column >> shift_);
#if defined(__AVX512F__)
    return (VecF)_mm512_permutexvar_ps((__m512i)index_, _mm512_loadu_ps(first));
#elif defined(__AVX2__)
    return (VecF)_mm256_permutevar8x32_ps(_mm256_loadu_ps(first), (__m256i)index_);
#else
    return broadcast(*first);
#endif
  }

 private:
  int shift_;
  VecU index_;
};

// Adds kRows rows of x, `depth` columns of them, times a row of W to `sums`, lane by lane. Without rounding, a group's
// sum is multiplied by the scale; with it, every weight is.
template <FloatType kRounding, int kRows>
inline void decode_row(const GroupCodes& codes, const LaneScales& lane_scales, const float* scales,
                       const uint8_t* bytes, const float* x, int64_t x_stride, int64_t depth, VecF* sums) {
  VecF total[kRows] = {};
  for (int64_t c = 0; c < depth; c += kGroup) {
    const VecF scale = lane_scales(scales, c);
    VecF part[kRows][2] = {};  // two chains hide more of an addition's latency than one
    codes(bytes + c / 2, depth - c, [&](int v, VecF code) {
      const VecF weight = kRounding == FloatType::kFloat32 ? code : rounded<kRounding>(code * scale);
      for (int i = 0; i < kRows; ++i) {
        part[i][v % 2] = fma(weight, load(x + i * x_stride + c + v * kLanes), part[i][v % 2]);
      }
    });
    for (int i = 0; i < kRows; ++i) {
      const VecF sum = part[i][0] + part[i][1];
      total[i] = kRounding == FloatType::kFloat32 ? fma(scale, sum, total[i]) : total[i] + sum;
    }
  }
  for (int i = 0; i < kRows; ++i) sums[i] += total[i];
}

template <FloatType kRounding, int kRows>
void decode_rows(const PackedLinearParams& p, int64_t m, int64_t begin, int64_t end) {
  constexpr int64_t kDepth = 2048;  // columns that are summed on their own: the rounding error grows with their number
  const PackedWeight& w = p.weight;
  const GroupCodes codes(w.code);
  const LaneScales lane_scales(w.block);
  const float* x = p.x + m * p.x_stride;
  // Scales are written well before they are read: a vector cannot be loaded of numbers that are still on their way.
  float scales[4][kDepth / 32 + kLanes];
  for (int64_t n0 = begin; n0 < end; n0 += 4) {
    const int64_t columns = smaller(4, end - n0);
    VecF sums[4][kRows] = {};
    for (int64_t k0 = 0; k0 < w.k; k0 += kDepth) {
      const int64_t depth = smaller(kDepth, w.k - k0), blocks = lane_scales.blocks(depth);
      for (int64_t j = 0; j < columns; ++j) {
        read_scales(w, lane_scales.block_of((n0 + j) * w.k + k0), blocks, scales[j]);
        store(scales[j] + blocks, VecF{});
      }
      for (int64_t j = 0; j < columns; ++j) {
        decode_row<kRounding, kRows>(codes, lane_scales, scales[j], w.data + ((n0 + j) * w.k + k0) / 2, x + k0,
                                     p.x_stride, depth, sums[j]);
      }
    }
    for (int64_t r = 0; r < p.rank; r += kLanes) {
      for (int64_t j = 0; j < columns; ++j) {
        const VecF b = load_first(p.b + (n0 + j) * p.b_stride + r, p.rank - r);
        for (int i = 0; i < kRows; ++i) sums[j][i] = fma(load(p.s + (m + i) * p.s_stride + r), b, sums[j][i]);
      }
    }
    for (int i = 0; i < kRows; ++i) {
      const VecF row[4] = {sums[0][i], sums[1][i], sums[2][i], sums[3][i]};
      float y[4];
      sum_four(row, y);
      for (int64_t j = 0; j < columns; ++j) {
        p.y[(m + i) * w.n + n0 + j] = y[j] + (p.bias != nullptr ? p.bias[n0 + j] : 0.0f);
      }
    }
  }
}

template <FloatType kRounding>
void decode(const PackedLinearParams& p, int64_t begin, int64_t end) {
  int64_t m = 0;
  for (; m + 4 <= p.rows; m += 4) decode_rows<kRounding, 4>(p, m, begin, end);
  switch (p.rows - m) {
    case 3:
      return decode_rows<kRounding, 3>(p, m, begin, end);
    case 2:
      return decode_rows<kRounding, 2>(p, m, begin, end);
    case 1:
      return decode_rows<kRounding, 1>(p, m, begin, end);
    default:
      return;
  }
}

void decode_any(const PackedLinearParams& p, int64_t begin, int64_t end) {
  switch (p.weight.rounding) {
    case FloatType::kBFloat16:
      return decode<FloatType::kBFloat16>(p, begin, end);
    case FloatType::kFloat16:
      return decode<FloatType::kFloat16>(p, begin, end);
    default:
      return decode<FloatType::kFloat32>(p, begin, end);
  }
}

// ----------------------------------------------------------------------------------------------- multiply

// Sums of a tile and what is multiplied fill the registers: 24 + 5 of 32, 12 + 4 of 16.
#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileColumns = 4;
#else
constexpr int kTileRows = 4, kTileColumns = 3;
#endif
constexpr int64_t kTileDepth = 1024;  // columns: at most 16 KB of W in fp32

// Columns of rows that lie `x_stride` apart, and of a few rows of a weight, kTileDepth apart.
struct TileOperands {
  const float* x;
  int64_t x_stride;
  const float* w;
  int64_t depth;  // a multiple of kPaddedColumns
};

template <int kRows>
inline void add_products(const TileOperands& t, int64_t m, VecF (&acc)[kRows][kTileColumns]) {
  if (t.depth == 0) return;
  const float* x = t.x + m * t.x_stride;
  for (int64_t c = 0; c < t.depth; c += kLanes) {
    VecF row[kTileColumns];
    for (int j = 0; j < kTileColumns; ++j) row[j] = load(t.w + j * kTileDepth + c);
    for (int i = 0; i < kRows; ++i) {
      const VecF value = load(x + i * t.x_stride + c);
      for (int j = 0; j < kTileColumns; ++j) acc[i][j] = fma(value, row[j], acc[i][j]);
    }
  }
}

// y[i, j] += the products for rows m, m + 1, ... of both; written where is_first.
template <int kRows>
inline void multiply_tile(const TileOperands& base, const TileOperands& branch, int64_t m, bool is_first, float* y,
                          int64_t y_stride, int64_t columns) {
  VecF acc[kRows][kTileColumns] = {};
  add_products<kRows>(branch, m, acc);
  add_products<kRows>(base, m, acc);
  for (int i = 0; i < kRows; ++i) {
    VecF last[4] = {};
    for (int j = 0; j < kTileColumns; ++j) last[j] = acc[i][j];
    float sums[4];
    sum_four(last, sums);
    float* row = y + (m + i) * y_stride;
    for (int64_t j = 0; j < columns; ++j) row[j] = (is_first ? 0.0f : row[j]) + sums[j];
  }
}

template <int kRows>
struct TileRows {
  static constexpr int value = kRows;
};

// Calls f(TileRows, first row) over [begin, end), with the largest tiles first.
template <int kRows, class F>
inline void for_tiles(int64_t begin, int64_t end, const F& f) {
  for (; begin + kRows <= end; begin += kRows) f(TileRows<kRows>{}, begin);
  if constexpr (kRows > 1) for_tiles<(kRows > 4 ? 4 : kRows / 2)>(begin, end, f);
}

template <FloatType kRounding>
void multiply(const PackedLinearParams& p, int64_t begin, int64_t end) {
  const PackedWeight& weight = p.weight;
  const Codes codes(weight.code);
  alignas(64) float w[kTileColumns][kTileDepth], b[kTileColumns][kTileDepth];
  for (int64_t n = begin; n < end; n += kTileColumns) {
    const int64_t columns = smaller(kTileColumns, end - n);
    float* y = p.y + n;
    // A part of W's columns and one of the branch's at a time, so that most often there is one sum to take over lanes.
    for (int64_t c = 0; c == 0 || c < weight.k || c < p.rank; c += kTileDepth) {
      const int64_t depth = c < weight.k ? smaller(kTileDepth, weight.k - c) : 0;
      const int64_t rank = c < p.rank ? smaller(kTileDepth, p.rank - c) : 0;
      for (int64_t j = 0; j < kTileColumns; ++j) {
        const int64_t column = n + smaller(j, columns - 1);  // columns that there are not repeat the last
        unpack_columns<kRounding>(weight, codes, column, c, c + depth, w[j]);
        memset(w[j] + depth, 0, sizeof(float) * (padded(depth) - depth));
        if (rank > 0) memcpy(b[j], p.b + column * p.b_stride + c, sizeof(float) * rank);
        memset(b[j] + rank, 0, sizeof(float) * (padded(rank) - rank));
      }
      const TileOperands base{depth > 0 ? p.x + c : nullptr, p.x_stride, w[0], padded(depth)};
      const TileOperands branch{rank > 0 ? p.s + c : nullptr, p.s_stride, b[0], padded(rank)};
      for_tiles<kTileRows>(0, p.rows, [&](auto count, int64_t m) {
        multiply_tile<decltype(count)::value>(base, branch, m, c == 0, y, weight.n, columns);
      });
    }
    if (p.bias == nullptr) continue;
    for (int64_t m = 0; m < p.rows; ++m) {
      for (int64_t j = 0; j < columns; ++j) y[m * weight.n + j] += p.bias[n + j];
    }
  }
}

void multiply_any(const PackedLinearParams& p, int64_t begin, int64_t end) {
  switch (p.weight.rounding) {
    case FloatType::kBFloat16:
      return multiply<FloatType::kBFloat16>(p, begin, end);
    case FloatType::kFloat16:
      return multiply<FloatType::kFloat16>(p, begin, end);
    default:
      return multiply<FloatType::kFloat32>(p, begin, end);
  }
}

}  // namespace

extern const PackedWeightKernels LK_PACKED_TABLE;
const PackedWeightKernels LK_PACKED_TABLE = {
    .unpack = unpack_any,
    .decode = decode_any,
    .arrange_x = arrange_x,
    .arranged_width = arranged_width,
    .multiply = multiply_any,
};

}  // namespace lk::cpu
