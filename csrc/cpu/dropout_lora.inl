// The LoRA branch under dropout: the products that need the mask, with the mask made in registers on the way.
// Included once per instruction set; LK_TABLE names the table it defines.
#include "kernels.h"
#include "simd.h"

namespace lk::cpu {
namespace {

// One vector of Philox calls serves this many consecutive elements of a row.
constexpr int kMaskColumns = kLanes * kDropoutGroup;
constexpr int kTileVectors = 2;
constexpr int kTileColumns = kTileVectors * kLanes;
constexpr int kTileRows = 4;  // 4 x 2 accumulators hide the latency of two fused multiply-adds per cycle

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Words of the groups first, first + 1, ... of the whole matrix: words[4 * i ..] belong to group first + i.
inline void philox_vector(uint64_t first, uint64_t seed, uint32_t* words) {
  VecU c0, c1, c2 = {}, c3 = {};
  for (int i = 0; i < kLanes; ++i) {
    c0[i] = static_cast<uint32_t>(first + i);
    c1[i] = static_cast<uint32_t>((first + i) >> 32);
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    VecU hi0, lo0, hi1, lo1;
    multiply_wide(c0, kPhiloxMultiplier0, hi0, lo0);
    multiply_wide(c2, kPhiloxMultiplier1, hi1, lo1);
    c0 = hi1 ^ c1 ^ broadcast(k0);
    c1 = lo1;
    c2 = hi0 ^ c3 ^ broadcast(k1);
    c3 = lo0;
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  for (int i = 0; i < kLanes; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
}

// keep[j] = all ones where element column + j of `row` survives, else 0, for j in [0, kMaskColumns).
// `column` is a multiple of kDropoutGroup; lanes past the end of the row hold garbage.
inline void keep_bits(const Dropout& dropout, int64_t row, int64_t column, int64_t columns, uint32_t* keep) {
  uint32_t words[4 * kLanes];
  philox_vector(row * dropout_groups_per_row(columns) + column / kDropoutGroup, dropout.seed, words);
  for (int i = 0; i < 4 * kLanes; ++i) {
    keep[2 * i] = (words[i] & 0xFFFFu) >= dropout.threshold ? ~0u : 0u;
    keep[2 * i + 1] = (words[i] >> 16) >= dropout.threshold ? ~0u : 0u;
  }
}

// out[j] = x[j] where kept, else 0, for j in [0, kMaskColumns); zero past `valid` columns.
inline void keep_row(const float* x, const uint32_t* keep, int64_t valid, float* out) {
  if (valid >= kMaskColumns) {
    for (int j = 0; j < kMaskColumns; j += kLanes) store(out + j, and_bits(load(x + j), load(keep + j)));
    return;
  }
  for (int j = 0; j < kMaskColumns; ++j) out[j] = j < valid && keep[j] != 0 ? x[j] : 0.0f;
}

// acc[i][:] += sum over p < depth of a[i * a_row + p * a_step] * b[p * b_step ...]: the product inside all of the below.
template <int kRows>
inline void multiply_tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, int64_t depth,
                          VecF (&acc)[kRows][kTileVectors]) {
  for (int64_t p = 0; p < depth; ++p) {
    const VecF b0 = load(b + p * b_step), b1 = load(b + p * b_step + kLanes);
    for (int i = 0; i < kRows; ++i) {
      const VecF value = broadcast(a[i * a_row + p * a_step]);
      acc[i][0] += value * b0;
      acc[i][1] += value * b1;
    }
  }
}

template <int kRows>
struct RowCount {
  static constexpr int value = kRows;
};

// Calls f(RowCount, first row) over [0, rows) in steps of kTileRows, then one by one.
template <class F>
inline void for_row_tiles(int64_t rows, const F& f) {
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows) f(RowCount<kTileRows>{}, i);
  for (; i < rows; ++i) f(RowCount<1>{}, i);
}

void dropout_mask(const DropoutMaskParams& p, int64_t begin, int64_t end) {
  const Dropout dropout{static_cast<uint64_t>(*p.seed), p.threshold, 1.0f};
  uint32_t keep[kMaskColumns];
  for (int64_t m = begin; m < end; ++m) {
    for (int64_t k = 0; k < p.columns; k += kMaskColumns) {
      keep_bits(dropout, m, k, p.columns, keep);
      for (int64_t j = 0; j < smaller(kMaskColumns, p.columns - k); ++j) p.keep[m * p.columns + k + j] = keep[j] != 0;
    }
  }
}

// ------------------------------------------------------------------------------------------------- shrink

// A transposed to [k, rank], both rounded up with zeros, so that the inner loop has no tails.
int64_t packed_a_size(int64_t rank, int64_t k) { return round_up(k, kMaskColumns) * round_up(rank, kTileColumns); }

void pack_a(const DropoutShrinkParams& p, float* packed) {
  const int64_t width = round_up(p.rank, kTileColumns), depth = round_up(p.k, kMaskColumns);
  memset(packed, 0, sizeof(float) * width * depth);
  for (int64_t j = 0; j < p.rank; ++j)
    for (int64_t k = 0; k < p.k; ++k) packed[k * width + j] = p.a[j * p.a_stride + k];
}

void dropout_shrink(const DropoutShrinkParams& p, const float* packed_a, int64_t begin, int64_t end) {
  constexpr int64_t kDepth = 1024;  // columns of x dropped at a time: 16 KB for 4 rows
  static_assert(kDepth % kMaskColumns == 0, "a chunk holds whole mask vectors");
  const int64_t width = round_up(p.rank, kTileColumns);
  for_row_tiles(end - begin, [&](auto count, int64_t offset) {
    constexpr int kRows = decltype(count)::value;
    const int64_t m = begin + offset;
    alignas(64) float dropped[kRows][kDepth];
    for (int64_t k0 = 0; k0 < p.k; k0 += kDepth) {
      const int64_t depth = smaller(kDepth, round_up(p.k - k0, kMaskColumns));
      for (int i = 0; i < kRows; ++i) {
        for (int64_t k = 0; k < depth; k += kMaskColumns) {
          uint32_t keep[kMaskColumns];
          keep_bits(p.dropout, p.first_row + m + i, k0 + k, p.k, keep);
          keep_row(p.x + (m + i) * p.x_stride + k0 + k, keep, p.k - k0 - k, &dropped[i][k]);
        }
      }
      for (int64_t j = 0; j < p.rank; j += kTileColumns) {
        VecF acc[kRows][kTileVectors] = {};
        multiply_tile<kRows>(&dropped[0][0], kDepth, 1, packed_a + k0 * width + j, width, depth, acc);
        for (int i = 0; i < kRows; ++i) {
          float* s = p.s + (m + i) * p.rank + j;
          for (int64_t c = 0; c < smaller(kTileColumns, p.rank - j); ++c) {
            s[c] = (k0 == 0 ? 0.0f : s[c]) + p.dropout.scale * acc[i][c / kLanes][c % kLanes];
          }
        }
      }
    }
  });
}

// ----------------------------------------------------------------------------------------------- backward

constexpr int64_t kBackwardRows = 32;  // rows whose mask and dropped x are held at a time

int64_t backward_scratch_size(int64_t rank) { return 2 * rank * kMaskColumns; }

void dropout_backward(const DropoutBackwardParams& p, float* scratch, int64_t begin, int64_t end) {
  alignas(64) uint32_t keep[kBackwardRows][kMaskColumns];
  alignas(64) float dropped[kBackwardRows][kMaskColumns];
  float* a_tile = scratch;                              // [rank, kMaskColumns] of A
  float* grad_a_tile = scratch + p.rank * kMaskColumns;  // the same of grad_a

  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t k0 = tile * kMaskColumns, valid = smaller(kMaskColumns, p.k - k0);
    memset(scratch, 0, sizeof(float) * backward_scratch_size(p.rank));
    if (p.a != nullptr) {
      for (int64_t j = 0; j < p.rank; ++j) {
        memcpy(a_tile + j * kMaskColumns, p.a + j * p.a_stride + k0, sizeof(float) * valid);
      }
    }

    for (int64_t m0 = 0; m0 < p.rows; m0 += kBackwardRows) {
      const int64_t rows = smaller(kBackwardRows, p.rows - m0);
      for (int64_t i = 0; i < rows; ++i) keep_bits(p.dropout, p.first_row + m0 + i, k0, p.k, keep[i]);

      if (p.a != nullptr) {
        for_row_tiles(rows, [&](auto count, int64_t i0) {
          constexpr int kRows = decltype(count)::value;
          for (int64_t c0 = 0; c0 < valid; c0 += kTileColumns) {
            VecF acc[kRows][kTileVectors] = {};
            multiply_tile<kRows>(p.grad_s + (m0 + i0) * p.rank, p.rank, 1, a_tile + c0, kMaskColumns, p.rank, acc);
            for (int i = 0; i < kRows; ++i) {
              float* grad_x = p.grad_x + (m0 + i0 + i) * p.grad_x_stride + k0 + c0;
              for (int v = 0; v < kTileVectors; ++v) {
                const VecF add = and_bits(acc[i][v] * p.alpha, load(&keep[i0 + i][c0 + v * kLanes]));
                const int64_t left = valid - c0 - v * kLanes;
                if (left >= kLanes) {
                  store(grad_x + v * kLanes, load(grad_x + v * kLanes) + add);
                } else {
                  for (int64_t c = 0; c < left; ++c) grad_x[v * kLanes + c] += add[c];
                }
              }
            }
          }
        });
      }

      if (p.x != nullptr) {
        for (int64_t i = 0; i < rows; ++i) {
          keep_row(p.x + (m0 + i) * p.x_stride + k0, keep[i], valid, dropped[i]);
        }
        for_row_tiles(p.rank, [&](auto count, int64_t j0) {
          constexpr int kRows = decltype(count)::value;
          for (int64_t c0 = 0; c0 < valid; c0 += kTileColumns) {
            VecF acc[kRows][kTileVectors] = {};
            multiply_tile<kRows>(p.grad_s + m0 * p.rank + j0, 1, p.rank, &dropped[0][c0], kMaskColumns, rows, acc);
            for (int i = 0; i < kRows; ++i) {
              float* sum = grad_a_tile + (j0 + i) * kMaskColumns + c0;
              for (int v = 0; v < kTileVectors; ++v) store(sum + v * kLanes, load(sum + v * kLanes) + acc[i][v]);
            }
          }
        });
      }
    }

    if (p.x != nullptr) {
      for (int64_t j = 0; j < p.rank; ++j)
        for (int64_t c = 0; c < valid; ++c) p.grad_a[j * p.k + k0 + c] += p.alpha * grad_a_tile[j * kMaskColumns + c];
    }
  }
}

}  // namespace

extern const Kernels LK_TABLE;
const Kernels LK_TABLE = {LK_ISA,   dropout_mask,     dropout_shrink,        pack_a,
                          packed_a_size, dropout_backward, backward_scratch_size, kMaskColumns};

}  // namespace lk::cpu
