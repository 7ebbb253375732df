// The narrow products of a LoRA branch, with the dropout mask made in registers on the way where there is one.
// A vendor GEMM is built for wide outputs: where one side is the rank, it reaches little more than half of its speed.
// Included once per instruction set; LK_TABLE names the table it defines, LK_PACKED_TABLE and LK_GATED_TABLE those of
// packed_weight.inl and gated_activation.inl.
#include "branch_tiles.h"
#include "cross_entropy_rows.inl"
#include "kernels.h"
#include "simd.h"

namespace lk::cpu {
namespace {

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

int64_t packed_width(int64_t rank) { return round_up(rank, kLanes); }

int64_t packed_size(int64_t rank, int64_t k) { return k * packed_width(rank); }

// rows[i][j] becomes rows[j][i], by exchanging ever smaller quarters.
template <int kStep>
LK_ALWAYS_INLINE inline void transpose_lanes(VecF (&rows)[kLanes]) {
  VecU upper, lower;
  for (int i = 0; i < kLanes; ++i) {
    upper[i] = (i & kStep) != 0 ? kLanes + i - kStep : i;
    lower[i] = (i & kStep) != 0 ? kLanes + i : i + kStep;
  }
  for (int i = 0; i < kLanes; ++i) {
    if ((i & kStep) != 0) continue;
    const VecF a = rows[i], b = rows[i + kStep];
    rows[i] = shuffle(a, b, upper);
    rows[i + kStep] = shuffle(a, b, lower);
  }
  if constexpr (kStep > 1) transpose_lanes<kStep / 2>(rows);
}

// Rows of W that lie in one piece each, in squares of whole vectors; what is left over goes by the element. A factor is
// read once, and seldom lies in a cache: what comes some squares later is fetched, along the rows or below them.
void pack_rows(const float* w, int64_t stride, int64_t rank, int64_t k, float* packed) {
  constexpr int64_t kAhead = 8 * kLanes;
  const int64_t width = packed_width(rank), whole = k / kLanes * kLanes;
  for (int64_t j = 0; j < width; j += kLanes) {
    const int64_t valid = smaller(kLanes, rank - j);
    for (int64_t c = 0; c < whole; c += kLanes) {
      VecF rows[kLanes];
      const float* ahead = w + j * stride + c + kAhead * (whole > kAhead ? 1 : stride);
      for (int i = 0; i < kLanes; ++i) __builtin_prefetch(ahead + i * stride);
      for (int i = 0; i < kLanes; ++i) rows[i] = i < valid ? load(w + (j + i) * stride + c) : VecF{};
      transpose_lanes<kLanes / 2>(rows);
      for (int i = 0; i < kLanes; ++i) store(packed + (c + i) * width + j, rows[i]);
    }
    for (int64_t c = whole; c < k; ++c) {
      for (int64_t i = 0; i < kLanes; ++i) packed[c * width + j + i] = i < valid ? w[(j + i) * stride + c] : 0.0f;
    }
  }
}

void pack_transposed(const float* w, int64_t stride_j, int64_t stride_c, int64_t rank, int64_t k, float* packed) {
  if (stride_c == 1) return pack_rows(w, stride_j, rank, k, packed);
  const int64_t width = packed_width(rank);
  for (int64_t c = 0; c < k; ++c) {
    float* const row = packed + c * width;
    if (stride_j == 1) {
      memcpy(row, w + c * stride_c, sizeof(float) * rank);
    } else {
      for (int64_t j = 0; j < rank; ++j) row[j] = w[j * stride_j + c * stride_c];
    }
    for (int64_t j = rank; j < width; ++j) row[j] = 0.0f;
  }
}

// Where row m lies in the matrix that the mask belongs to.
template <class Params>
inline int64_t row_of(const Params& p, int64_t m) {
  return p.row_ids != nullptr ? p.row_ids[m] : p.first_row + m;
}

// Columns j, j + 1, ... of s, as many as kVectors hold: rows of x times a packed chunk of W, added unless it is the
// first.
template <int kRows, int kVectors>
inline void shrink_tile(const LoraShrinkParams& p, const float* x, int64_t x_stride, const float* packed, int64_t depth,
                        bool is_first, float* s, int64_t j) {
  VecF acc[kRows][kVectors] = {};
  multiply_tile(x, x_stride, 1, packed + j, packed_width(p.rank), depth, acc);
  const int64_t valid = smaller(kVectors * kLanes, p.rank - j);
  for (int i = 0; i < kRows; ++i) {
    float* out = s + i * p.s_stride + j;
    for (int64_t c = 0; c < valid; ++c) {
      out[c] = (is_first ? 0.0f : out[c]) + p.dropout.scale * acc[i][c / kLanes][c % kLanes];
    }
  }
}

template <bool kHasDropout>
void lora_shrink(const LoraShrinkParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kDepth = 1024;  // columns of x at a time: 16 KB for 4 rows, and the packed chunk stays in L2
  static_assert(kDepth % kMaskColumns == 0, "a chunk holds whole mask vectors");
  const int64_t width = packed_width(p.rank);
  for_row_tiles(end - begin, [&](auto count, int64_t offset) {
    constexpr int kRows = decltype(count)::value;
    const int64_t m = begin + offset;
    alignas(64) float dropped[kRows][kDepth];
    for (int64_t k0 = 0; k0 < p.k; k0 += kDepth) {
      const float* x = p.x + m * p.x_stride + k0;
      int64_t x_stride = p.x_stride, depth = smaller(kDepth, p.k - k0);
      if constexpr (kHasDropout) {
        for (int i = 0; i < kRows; ++i) {
          for (int64_t k = 0; k < depth; k += kMaskColumns) {
            uint32_t keep[kMaskColumns];
            keep_bits(p.dropout, row_of(p, m + i), k0 + k, p.k, keep);
            keep_row(x + i * p.x_stride + k, keep, depth - k, &dropped[i][k]);
          }
        }
        x = &dropped[0][0];
        x_stride = kDepth;
      }
      const float* packed = p.packed + k0 * width;
      float* s = p.s + m * p.s_stride;
      int64_t j = 0;
      for (; j + kLanes < width; j += kTileColumns) {
        shrink_tile<kRows, kTileVectors>(p, x, x_stride, packed, depth, k0 == 0, s, j);
      }
      if (j < width) shrink_tile<kRows, 1>(p, x, x_stride, packed, depth, k0 == 0, s, j);
    }
  });
}

void lora_shrink_any(const LoraShrinkParams& p, int64_t begin, int64_t end) {
  (p.has_dropout ? lora_shrink<true> : lora_shrink<false>)(p, begin, end);
}

// ------------------------------------------------------------------------------------------------- expand

// Row m of s belongs there. The rows of the tile below, whose first is `next`, are fetched on the way: y has left the
// caches since it was written, and its rows are too short for the hardware to see where they lead.
template <int kRows, int kVectors>
inline void expand_tile(const LoraExpandParams& p, int64_t m, int64_t next, int64_t end, int64_t c0) {
  const auto row_of = [&](int64_t i) { return p.row_ids != nullptr ? p.row_ids[i] : i; };
  for (int64_t i = next; i < smaller(end, next + kRows); ++i) {
    const float* base = p.base + row_of(i) * p.base_stride + c0;
    for (int v = 0; v < kVectors; ++v) __builtin_prefetch(base + v * kLanes, 1);
  }
  VecF acc[kRows][kVectors] = {};
  multiply_tile(p.s + m * p.rank, p.rank, 1, p.packed + c0, packed_width(p.n), p.rank, acc);
  for (int i = 0; i < kRows; ++i) {
    const int64_t row = row_of(m + i);
    const float* base = p.base + row * p.base_stride + c0;
    float* y = p.y + row * p.y_stride + c0;
    for (int v = 0; v < kVectors; ++v, base += kLanes, y += kLanes) {
      const float* bias = p.bias != nullptr ? p.bias + c0 + v * kLanes : nullptr;
      const int64_t left = p.n - c0 - v * kLanes;
      if (left >= kLanes) {
        const VecF added = acc[i][v] * p.alpha;
        store(y, load(base) + (bias != nullptr ? added + load(bias) : added));
      } else {
        for (int64_t c = 0; c < left; ++c) y[c] = base[c] + (acc[i][v][c] * p.alpha + (bias ? bias[c] : 0.0f));
      }
    }
  }
}

void lora_expand(const LoraExpandParams& p, int64_t begin, int64_t end) {
  const int64_t width = packed_width(p.n);
  for_row_tiles(end - begin, [&](auto count, int64_t offset) {
    constexpr int kRows = decltype(count)::value;
    const int64_t m = begin + offset;
    int64_t c = 0;
    for (; c + kLanes < width; c += kTileColumns) expand_tile<kRows, kTileVectors>(p, m, m + kRows, end, c);
    if (c < width) expand_tile<kRows, 1>(p, m, m + kRows, end, c);
  });
}

// ------------------------------------------------------------------------------------------------- decode

// A tile of y: whole vectors of products, and what is left of rows that are no multiple of a vector long.
template <int kRows, int kColumns>
struct Dots {
  VecF vector[kRows][kColumns] = {};
  float rest[kRows][kColumns] = {};

  // Adds factor · (row i of a · row j of b), over `depth` columns.
  inline void add(float factor, const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth) {
    int64_t p = 0;
    for (; p + kLanes <= depth; p += kLanes) {
      VecF a_row[kRows];
      for (int i = 0; i < kRows; ++i) a_row[i] = load(a + i * a_stride + p) * factor;
      for (int j = 0; j < kColumns; ++j) {
        const VecF b_row = load(b + j * b_stride + p);
        for (int i = 0; i < kRows; ++i) vector[i][j] += a_row[i] * b_row;
      }
    }
    for (; p < depth; ++p) {
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kColumns; ++j) rest[i][j] += factor * a[i * a_stride + p] * b[j * b_stride + p];
      }
    }
  }

  inline void add(const Dots& other) {
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) {
        vector[i][j] += other.vector[i][j];
        rest[i][j] += other.rest[i][j];
      }
    }
  }
};

constexpr int64_t kDecodeDepth = 256 * kLanes;  // a sum over more is made in parts: each lane's rounding adds up

template <int kRows, int kColumns>
inline void decode_tile(const LoraDecodeParams& p, int64_t m, int64_t n) {
  Dots<kRows, kColumns> y;
  if (p.s != nullptr) y.add(p.alpha, p.s + m * p.rank, p.rank, p.b + n * p.b_stride, p.b_stride, p.rank);
  const float *x = p.x + m * p.x_stride, *w = p.w + n * p.w_stride;
  int64_t left = p.k;
  for (; left > kDecodeDepth; left -= kDecodeDepth, x += kDecodeDepth, w += kDecodeDepth) {
    Dots<kRows, kColumns> part;
    part.add(1.0f, x, p.x_stride, w, p.w_stride, kDecodeDepth);
    y.add(part);
  }
  y.add(1.0f, x, p.x_stride, w, p.w_stride, left);
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) {
      const float bias = p.bias != nullptr ? p.bias[n + j] : 0.0f;
      p.y[(m + i) * p.n + n + j] = sum(y.vector[i][j]) + y.rest[i][j] + bias;
    }
  }
}

template <int kRows>
void decode_rows(const LoraDecodeParams& p, int64_t m, int64_t begin, int64_t end) {
  constexpr int kColumns = 8 / kRows;  // eight sums hide the latency of an FMA, and fit into the registers
  int64_t n = begin;
  for (; n + kColumns <= end; n += kColumns) decode_tile<kRows, kColumns>(p, m, n);
  for (; n < end; ++n) decode_tile<kRows, 1>(p, m, n);
}

void lora_decode(const LoraDecodeParams& p, int64_t begin, int64_t end) {
  int64_t m = 0;
  for (; m + 4 <= p.rows; m += 4) decode_rows<4>(p, m, begin, end);
  if (m + 2 <= p.rows) decode_rows<2>(p, m, begin, end), m += 2;
  if (m < p.rows) decode_rows<1>(p, m, begin, end);
}

// ----------------------------------------------------------------------------------------------- gradients

constexpr int64_t kGradRows = 32;  // rows whose mask and dropped x are held at a time

// Without a mask the tile is narrower, so that the threads get even shares.
template <bool kHasDropout>
constexpr int64_t kGradColumns = kHasDropout ? kMaskColumns : 2 * kTileColumns;

int64_t lora_grad_tile(bool has_dropout) { return has_dropout ? kGradColumns<true> : kGradColumns<false>; }

// Per column tile: [rank, kColumns] of A and the same of grad.
int64_t lora_grad_scratch_size(int64_t rank, int64_t tiles) { return 2 * rank * kMaskColumns * tiles; }

template <bool kHasDropout>
void lora_grad(const LoraGradParams& p, float* scratch, int64_t begin, int64_t end) {
  constexpr int64_t kColumns = kGradColumns<kHasDropout>;
  alignas(64) uint32_t keep[kGradRows][kMaskColumns];
  alignas(64) float copied[kGradRows][kMaskColumns];
  const int64_t tile_size = p.rank * kColumns;
  float* a_tiles = scratch;
  float* grad_tiles = scratch + (end - begin) * tile_size;
  memset(scratch, 0, sizeof(float) * 2 * (end - begin) * tile_size);
  if constexpr (!kHasDropout) memset(keep, 0xFF, sizeof keep);
  if (p.a != nullptr) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t k0 = tile * kColumns;
      for (int64_t j = 0; j < p.rank; ++j) {
        memcpy(a_tiles + (tile - begin) * tile_size + j * kColumns, p.a + j * p.a_stride + k0,
               sizeof(float) * smaller(kColumns, p.k - k0));
      }
    }
  }

  // Rows outside, tiles inside: the rows of x are then read in long runs, which the hardware prefetches.
  for (int64_t m0 = 0; m0 < p.rows; m0 += kGradRows) {
    const int64_t rows = smaller(kGradRows, p.rows - m0);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t k0 = tile * kColumns, valid = smaller(kColumns, p.k - k0);
      const float* a_tile = a_tiles + (tile - begin) * tile_size;
      float* grad_tile = grad_tiles + (tile - begin) * tile_size;
      if constexpr (kHasDropout) {
        for (int64_t i = 0; i < rows; ++i) keep_bits(p.dropout, row_of(p, m0 + i), k0, p.k, keep[i]);
      }

      if (p.a != nullptr) {
        for_row_tiles(rows, [&](auto count, int64_t i0) {
          constexpr int kRows = decltype(count)::value;
          for (int64_t c0 = 0; c0 < valid; c0 += kTileColumns) {
            VecF acc[kRows][kTileVectors] = {};
            multiply_tile(p.s + (m0 + i0) * p.s_stride, p.s_stride, 1, a_tile + c0, kColumns, p.rank, acc);
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
        const float* x = p.x + m0 * p.x_stride + k0;
        int64_t x_stride = p.x_stride;
        // A partial tile is copied too: whole vectors would read past the end of the row.
        if (kHasDropout || valid < kColumns) {
          for (int64_t i = 0; i < rows; ++i) keep_row(x + i * p.x_stride, keep[i], valid, copied[i]);
          x = &copied[0][0];
          x_stride = kMaskColumns;
        }
        for_row_tiles(p.rank, [&](auto count, int64_t j0) {
          constexpr int kRows = decltype(count)::value;
          for (int64_t c0 = 0; c0 < valid; c0 += kTileColumns) {
            // A block of rows is summed on its own and then added: the rounding error grows with the number of blocks.
            VecF acc[kRows][kTileVectors] = {};
            multiply_tile(p.s + m0 * p.s_stride + j0, 1, p.s_stride, x + c0, x_stride, rows, acc);
            for (int i = 0; i < kRows; ++i) {
              float* sum = grad_tile + (j0 + i) * kColumns + c0;
              for (int v = 0; v < kTileVectors; ++v) store(sum + v * kLanes, load(sum + v * kLanes) + acc[i][v]);
            }
          }
        });
      }
    }
  }

  if (p.x == nullptr) return;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t k0 = tile * kColumns;
    const float* grad_tile = grad_tiles + (tile - begin) * tile_size;
    const int64_t valid = smaller(kColumns, p.k - k0);
    const auto add = [&](int64_t j, int64_t c) {
      p.grad[j * p.grad_stride_j + (k0 + c) * p.grad_stride_c] += p.alpha * grad_tile[j * kColumns + c];
    };
    if (p.grad_stride_c == 1) {
      for (int64_t j = 0; j < p.rank; ++j) {
        for (int64_t c = 0; c < valid; ++c) add(j, c);
      }
    } else {
      for (int64_t c = 0; c < valid; ++c) {
        for (int64_t j = 0; j < p.rank; ++j) add(j, c);
      }
    }
  }
}

void lora_grad_any(const LoraGradParams& p, float* scratch, int64_t begin, int64_t end) {
  (p.has_dropout ? lora_grad<true> : lora_grad<false>)(p, scratch, begin, end);
}

}  // namespace

extern const PackedWeightKernels LK_PACKED_TABLE;
extern const GatedActivationKernels LK_GATED_TABLE;
extern const Kernels LK_TABLE;
const Kernels LK_TABLE = {
    .isa = LK_ISA,
    .dropout_mask = dropout_mask,
    .pack_transposed = pack_transposed,
    .packed_size = packed_size,
    .lora_shrink = lora_shrink_any,
    .lora_expand = lora_expand,
    .lora_decode = lora_decode,
    .lora_grad = lora_grad_any,
    .lora_grad_tile = lora_grad_tile,
    .lora_grad_scratch_size = lora_grad_scratch_size,
    .cross_entropy_rows = cross_entropy_rows,
    .packed = &LK_PACKED_TABLE,
    .gated = &LK_GATED_TABLE,
};

}  // namespace lk::cpu
