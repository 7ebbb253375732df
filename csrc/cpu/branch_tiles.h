// What the narrow products of a LoRA branch are made of: masks, and tiles of a product. Included once per instruction
// set.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace lk::cpu {
namespace {

// One vector of Philox calls serves this many consecutive elements of a row.
constexpr int kMaskColumns = kLanes * kDropoutGroup;
constexpr int kTileVectors = 2;
constexpr int kTileColumns = kTileVectors * kLanes;  // six rows of two vectors hide the latency of two FMAs per cycle

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

// acc[i][:] += sum over p < depth of a[i * a_row + p * a_step] * b[p * b_step ...]: the product inside all of the
// below.
template <int kRows, int kVectors>
inline void multiply_tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, int64_t depth,
                          VecF (&acc)[kRows][kVectors]) {
  // Two pointers, so that every row is within reach of an addressing mode and no offset lives in a register.
  const float* upper = a + 3 * a_row;
  for (int64_t p = 0; p < depth; ++p, a += a_step, upper += a_step, b += b_step) {
    VecF b_row[kVectors];
    for (int v = 0; v < kVectors; ++v) b_row[v] = load(b + v * kLanes);
    for (int i = 0; i < kRows; ++i) {
      const VecF value = broadcast(i < 3 ? a[i * a_row] : upper[(i - 3) * a_row]);
      for (int v = 0; v < kVectors; ++v) acc[i][v] += value * b_row[v];
    }
  }
}

template <int kRows>
struct RowCount {
  static constexpr int value = kRows;
};

// Calls f(RowCount, first row) over [0, rows), six, four, two and one at a time.
template <class F>
inline void for_row_tiles(int64_t rows, const F& f) {
  int64_t i = 0;
  for (; i + 6 <= rows; i += 6) f(RowCount<6>{}, i);
  if (i + 4 <= rows) f(RowCount<4>{}, i), i += 4;
  if (i + 2 <= rows) f(RowCount<2>{}, i), i += 2;
  if (i < rows) f(RowCount<1>{}, i);
}

}  // namespace
}  // namespace lk::cpu
