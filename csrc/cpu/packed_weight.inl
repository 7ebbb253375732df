// Packed weights, decoded on their way into a buffer or into a product.
// Included once per instruction set; LK_PACKED_TABLE names the table it defines. Compiled without contraction: a weight
// and a quantised scale are products that are rounded before anything is added to them, and fma() says where one is
// not.
#include "packed_layouts.h"

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

// ------------------------------------------------------------------------------------------------- scales

inline int64_t scales_of_row(const PackedWeight& w) { return (w.k + w.block - 1) / w.block; }

// Of row n, the first. A division takes as long as a block of weights.
inline int64_t first_scale(const PackedWeight& w, int64_t n, int64_t per_row) {
  return (w.rows_per_scale == 1 ? n : n / w.rows_per_scale) * per_row;
}

inline float scale_of(const PackedWeight& w, int64_t scale) {
  if (w.indices == nullptr) return w.scales[scale];
  const float product = w.code2[w.indices[scale]] * w.scales2[scale / kScalesPerScale2];
  return product + w.offset;
}

// `count` scales; up to kLanes numbers more may be written.
inline void read_scales(const PackedWeight& w, int64_t first, int64_t count, float* out) {
  if (w.indices == nullptr) {
    for (int64_t i = 0; i < count; i += kLanes) store(out + i, load_first(w.scales + first + i, count - i));
    return;
  }
  const float* code2 = w.code2;
  const float offset = w.offset;
  for (int64_t i = 0; i < count;) {
    const float scale2 = w.scales2[(first + i) / kScalesPerScale2];
    const uint8_t* indices = w.indices + first;
    const int64_t end = smaller(count, i + kScalesPerScale2 - (first + i) % kScalesPerScale2);
    for (; i < end; ++i) {
      const float product = code2[indices[i]] * scale2;
      out[i] = product + offset;
    }
  }
}

// ------------------------------------------------------------------------------------------------- unpack

// Columns [begin, end) of row n of W; begin and end are even where weights are halves of bytes.
template <class Layout, FloatType kRounding, class Out>
void unpack_columns(const PackedWeight& w, int64_t n, int64_t begin, int64_t end, void* out) {
  constexpr int64_t kRunBytes = kRun * Layout::kBits / 8;
  const Layout layout(w);
  int64_t scale = first_scale(w, n, scales_of_row(w)) + begin / w.block, block_end = begin - begin % w.block;
  const uint8_t* bytes = w.data + (n * w.k + begin) * Layout::kBits / 8;
  Out* to = static_cast<Out*>(out);
  for (int64_t c = begin; c < end; ++scale) {
    const typename Layout::template Run<kRounding, Out> run(layout, scale_of(w, scale));
    block_end = smaller(block_end + w.block, end);
    for (; c + kRun <= block_end; c += kRun, to += kRun, bytes += kRunBytes) run.in_order(bytes, to);
    if (c < block_end) {  // a block that ends within a run
      const int64_t left = block_end - c, left_bytes = left * Layout::kBits / 8;
      uint8_t last[kRunBytes] = {};
      Out decoded[kRun];
      memcpy(last, bytes, left_bytes);
      run.in_order(last, decoded);
      memcpy(to, decoded, sizeof(Out) * left);
      c = block_end;
      to += left;
      bytes += left_bytes;
    }
  }
}

using UnpackColumns = void (*)(const PackedWeight&, int64_t n, int64_t begin, int64_t end, void* out);

UnpackColumns unpack_columns_of(const PackedWeight& w, bool is_narrow) {
  return with_kind(w, [&](auto kind) -> UnpackColumns {
    using K = decltype(kind);
    if constexpr (K::kRounding != FloatType::kFloat32) {
      if (is_narrow) return unpack_columns<typename K::Layout, K::kRounding, uint16_t>;
    }
    return unpack_columns<typename K::Layout, K::kRounding, float>;
  });
}

void unpack(const UnpackParams& p, int64_t begin, int64_t end) {
  const UnpackColumns columns = unpack_columns_of(p.weight, p.is_narrow);
  const int64_t k = p.weight.k, row_bytes = k * (p.is_narrow ? 2 : 4);
  for (int64_t n = begin; n < end; ++n) {
    columns(p.weight, n, 0, k, static_cast<char*>(p.out) + (n - p.first_row) * row_bytes);
  }
}

// ------------------------------------------------------------------------------------------------- decode

void arrange_x(const PackedWeight& w, const float* x, float* arranged) {
  with_kind(w, [&](auto kind) {
    for (int64_t c = 0; c < w.k; c += kRun) {
      for (int v = 0; v < kRunVectors; ++v) {
        for (int lane = 0; lane < kLanes; ++lane) {
          const int64_t column = c + decltype(kind)::Layout::weight_of(v, lane);
          arranged[c + v * kLanes + lane] = column < w.k ? x[column] : 0.0f;
        }
      }
    }
  });
}

// A part of the columns of W: `depth` columns, of which the first `lead` have the first scale, and then `block` each
// the next. What is the same in every row is reckoned once.
struct RowPart {
  int64_t depth, lead, block;
  int64_t first_scale, scales;  // of a row's
  int64_t pairs_of_block;       // of runs, where all blocks are whole pairs of them; else 0

  RowPart(const PackedWeight& w, int64_t begin, int64_t columns)
      : depth(columns),
        lead(smaller(w.block - begin % w.block, columns)),
        block(smaller(w.block, columns)),
        first_scale(begin / w.block),
        scales((begin + columns - 1) / w.block - first_scale + 1),
        pairs_of_block(
            block > 0 && lead == block && block % (2 * kRun) == 0 && columns % block == 0 ? block / (2 * kRun) : 0) {}
};

// Adds kRows rows of x times a part of a row of W to `sums`, lane by lane.
template <class Layout, FloatType kRounding, int kRows>
inline void decode_row(const Layout& layout, const RowPart& part, const uint8_t* bytes, const float* scale,
                       const float* x, int64_t x_stride, VecF* sums) {
  using Run = typename Layout::template Run<kRounding, float>;
  constexpr int kChains = kRows == 1 ? 4 : 2;  // several chains hide more of an addition's latency than one
  constexpr int64_t kRunBytes = kRun * Layout::kBits / 8;
  VecF chains[kRows][kChains] = {}, total[kRows] = {};
  const auto add_run = [&](const Run& run, const uint8_t* from, int first) LK_ALWAYS_INLINE {
    run.in_any_order(from, [&](int v, VecF w) LK_ALWAYS_INLINE {
      for (int i = 0; i < kRows; ++i) {
        VecF& chain = chains[i][(first + v) % kChains];
        chain = fma(w, load(x + i * x_stride + v * kLanes), chain);
      }
    });
    x += kRun;
  };
  const auto add_pairs = [&](const Run& run, int64_t count) LK_ALWAYS_INLINE {
    for (; count > 0; --count, bytes += 2 * kRunBytes) {
      add_run(run, bytes, 0);
      add_run(run, bytes + kRunBytes, kRunVectors);
    }
  };
  const auto end_chains = [&](VecF scale) LK_ALWAYS_INLINE {
    for (int i = 0; i < kRows; ++i) {
      VecF sum = chains[i][0];
      for (int j = 1; j < kChains; ++j) sum += chains[i][j];
      for (int j = 0; j < kChains; ++j) chains[i][j] = VecF{};
      total[i] = fma(scale, sum, total[i]);
    }
  };

  if (part.pairs_of_block > 0) {
    for (int64_t blocks = part.scales; blocks > 0; --blocks, ++scale) {
      add_pairs(Run(layout, *scale), part.pairs_of_block);
      if constexpr (Run::kLacksScale) end_chains(broadcast(*scale));
    }
  } else {
    int64_t end = part.lead;
    for (int64_t c = 0; c < part.depth; c = end, end = smaller(end + part.block, part.depth), ++scale) {
      const Run run(layout, *scale);
      int64_t left = end - c;
      add_pairs(run, left / (2 * kRun));
      left %= 2 * kRun;
      if (left >= kRun) {
        add_run(run, bytes, 0);
        bytes += kRunBytes;
        left -= kRun;
      }
      if (left > 0) {  // the end of W's row
        uint8_t last[kRunBytes] = {};
        memcpy(last, bytes, left * Layout::kBits / 8);
        add_run(run, last, 0);
      }
      if constexpr (Run::kLacksScale) end_chains(broadcast(*scale));
    }
  }
  if constexpr (!Run::kLacksScale) end_chains(broadcast(1.0f));
  for (int i = 0; i < kRows; ++i) sums[i] += total[i];
}

template <class Layout, FloatType kRounding, int kRows>
void decode_rows(const PackedLinearParams& p, int64_t m, int64_t begin, int64_t end) {
  constexpr int64_t kDepth = 128 * kLanes;  // summed on their own: the rounding error grows with a lane's terms
  const PackedWeight& w = p.weight;
  const Layout layout(w);
  const float* x = static_cast<const float*>(p.x) + m * p.x_stride;
  const int64_t per_row = scales_of_row(w);
  const RowPart whole(w, 0, smaller(kDepth, w.k));
  constexpr int64_t kMostScales = kDepth / kRun + 1;
  float scales[4 * kMostScales + kLanes];
  for (int64_t n0 = begin; n0 < end; n0 += 4) {
    const int64_t columns = smaller(4, end - n0);
    VecF sums[4][kRows] = {};
    for (int64_t k0 = 0; k0 < w.k; k0 += kDepth) {
      const RowPart part = k0 == 0 ? whole : RowPart(w, k0, smaller(kDepth, w.k - k0));
      const bool are_neighbours = part.scales == per_row && w.rows_per_scale == 1;
      if (are_neighbours) read_scales(w, n0 * per_row, columns * per_row, scales);
      for (int64_t j = 0; j < columns && !are_neighbours; ++j) {
        const int64_t first = first_scale(w, n0 + j, per_row) + part.first_scale;
        read_scales(w, first, part.scales, scales + j * part.scales);
      }
      for (int64_t j = 0; j < columns; ++j) {
        const uint8_t* bytes = w.data + ((n0 + j) * w.k + k0) * Layout::kBits / 8;
        decode_row<Layout, kRounding, kRows>(layout, part, bytes, scales + j * part.scales, x + k0, p.x_stride,
                                             sums[j]);
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

template <class Layout, FloatType kRounding>
void decode_all(const PackedLinearParams& p, int64_t begin, int64_t end) {
  int64_t m = 0;
  for (; m + 4 <= p.rows; m += 4) decode_rows<Layout, kRounding, 4>(p, m, begin, end);
  switch (p.rows - m) {
    case 3:
      return decode_rows<Layout, kRounding, 3>(p, m, begin, end);
    case 2:
      return decode_rows<Layout, kRounding, 2>(p, m, begin, end);
    case 1:
      return decode_rows<Layout, kRounding, 1>(p, m, begin, end);
    default:
      return;
  }
}

void decode(const PackedLinearParams& p, int64_t begin, int64_t end) {
  with_kind(p.weight,
            [&](auto kind) { decode_all<typename decltype(kind)::Layout, decltype(kind)::kRounding>(p, begin, end); });
}

// ----------------------------------------------------------------------------------------------- multiply

// Sums of a tile and what is multiplied fill the registers: 24 + 5 of 32, 12 + 4 of 16.
#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileColumns = 4;
#else
constexpr int kTileRows = 4, kTileColumns = 3;
#endif
constexpr int64_t kTileDepth = 1024;  // columns: at most 16 KB of W in fp32
// Columns that are summed on their own, as in decode_rows. Vectors of eight and more have few terms a lane anyway, and
// sums beside those of the tile would not fit into the registers.
constexpr int64_t kSumDepth = kLanes < 8 ? 32 * kLanes : kTileDepth;

// A vector of the numbers that a product is of, which are added up in fp32.
template <class Number>
struct Factors;

template <>
struct Factors<float> {
  static constexpr int kCount = kLanes;

  explicit Factors(const float* p) : v(load(p)) {}

  static VecF multiply_add(const Factors& a, const Factors& b, VecF sum) { return fma(a.v, b.v, sum); }

  VecF v;
};

#if defined(__AVX512BF16__)
template <>
struct Factors<uint16_t> {
  static constexpr int kCount = 2 * kLanes;

  explicit Factors(const uint16_t* p) : v((__m512bh)_mm512_loadu_si512(p)) {}

  static VecF multiply_add(const Factors& a, const Factors& b, VecF sum) {
    return (VecF)_mm512_dpbf16_ps((__m512)sum, a.v, b.v);
  }

  __m512bh v;
};
#endif

// Columns of rows that lie `x_stride` apart, and of a few rows of a weight, kTileDepth apart.
template <class Number>
struct TileOperands {
  const Number* x;
  int64_t x_stride;
  const Number* w;
  int64_t depth;  // a multiple of kPaddedColumns
};

// Adds the products of rows m, m + 1, ... of both to `sums`.
template <int kRows, class Number>
LK_ALWAYS_INLINE inline void add_products(const TileOperands<Number>& t, int64_t m, VecF (&sums)[kRows][kTileColumns]) {
  using Vector = Factors<Number>;
  VecF acc[kRows][kTileColumns];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kTileColumns; ++j) acc[i][j] = sums[i][j];
  }
  const Number* x = t.x + m * t.x_stride;
  for (int64_t c = 0; c < t.depth; c += Vector::kCount) {
    for (int i = 0; i < kRows; ++i) {
      const Vector value(x + i * t.x_stride + c);
      for (int j = 0; j < kTileColumns; ++j) {
        acc[i][j] = Vector::multiply_add(value, Vector(t.w + j * kTileDepth + c), acc[i][j]);
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kTileColumns; ++j) sums[i][j] = acc[i][j];
  }
}

// y[i, j] += the products for rows m, m + 1, ... of both; written where is_first.
template <int kRows, class Number>
inline void multiply_tile(const TileOperands<Number>& base, const TileOperands<float>& branch, int64_t m, bool is_first,
                          float* y, int64_t y_stride, int64_t columns) {
  VecF acc[kRows][kTileColumns] = {};
  if (branch.depth > 0) add_products<kRows>(branch, m, acc);
  for (int64_t c = 0; c < base.depth; c += kSumDepth) {
    const TileOperands<Number> part{base.x + c, base.x_stride, base.w + c, smaller(kSumDepth, base.depth - c)};
    if constexpr (kSumDepth == kTileDepth) {
      add_products<kRows>(part, m, acc);
    } else {
      VecF sums[kRows][kTileColumns] = {};
      add_products<kRows>(part, m, sums);
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kTileColumns; ++j) acc[i][j] = acc[i][j] + sums[i][j];
      }
    }
  }
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

template <class Number>
void multiply(const PackedLinearParams& p, int64_t begin, int64_t end) {
  const PackedWeight& weight = p.weight;
  const UnpackColumns unpack = unpack_columns_of(weight, sizeof(Number) < sizeof(float));
  const Number* x = static_cast<const Number*>(p.x);
  alignas(64) Number w[kTileColumns][kTileDepth];
  alignas(64) float b[kTileColumns][kTileDepth];
  for (int64_t n = begin; n < end; n += kTileColumns) {
    const int64_t columns = smaller(kTileColumns, end - n);
    float* y = p.y + n;
    // A part of W's columns and one of the branch's at a time, so that most often there is one sum to take over lanes.
    for (int64_t c = 0; c == 0 || c < weight.k || c < p.rank; c += kTileDepth) {
      const int64_t depth = c < weight.k ? smaller(kTileDepth, weight.k - c) : 0;
      const int64_t rank = c < p.rank ? smaller(kTileDepth, p.rank - c) : 0;
      for (int64_t j = 0; j < kTileColumns; ++j) {
        const int64_t column = n + smaller(j, columns - 1);  // columns that there are not repeat the last
        unpack(weight, column, c, c + depth, w[j]);
        memset(w[j] + depth, 0, sizeof(Number) * (padded(depth) - depth));
        if (rank > 0) memcpy(b[j], p.b + column * p.b_stride + c, sizeof(float) * rank);
        memset(b[j] + rank, 0, sizeof(float) * (padded(rank) - rank));
      }
      const TileOperands<Number> base{depth > 0 ? x + c : nullptr, p.x_stride, w[0], padded(depth)};
      const TileOperands<float> branch{rank > 0 ? p.s + c : nullptr, p.s_stride, b[0], padded(rank)};
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

}  // namespace

extern const PackedWeightKernels LK_PACKED_TABLE;
const PackedWeightKernels LK_PACKED_TABLE = {
    .unpack = unpack,
    .decode = decode,
    .arrange_x = arrange_x,
    .multiply = multiply<float>,
#if defined(__AVX512BF16__)
    .multiply_bf16 = multiply<uint16_t>,
#else
    .multiply_bf16 = nullptr,
#endif
};

}  // namespace lk::cpu
