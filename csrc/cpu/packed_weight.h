// Weights of 4 bits on the CPU: decoding, by a table of functions per instruction set.
#pragma once

#include <cstdint>

#include "../params/common.h"

namespace lk {

// Layout "codes4": W [n, k] in fp32 is code[nibble] · scale, one rounded product. Two weights share a byte, the first
// in the high nibble; `block` consecutive weights of a row share a scale.
struct PackedWeight {
  const uint8_t* data;  // [n * k / 2]
  const float* scales;  // [n * k / block]; null where they are quantised themselves
  const float* code;    // [16]
  int64_t n, k, block;  // k is a multiple of block, block of 2
  FloatType rounding;   // what each weight is rounded to, to nearest even; kFloat32 where it stays as it is
  // Quantised scales: scale b is code2[indices[b]] · scales2[b / kScalesBlock] + offset, of two rounded operations.
  const uint8_t* indices;  // [n * k / block]; null where the scales are not quantised
  const float* scales2;    // [n * k / block / kScalesBlock, rounded up]
  const float* code2;      // [256]
  float offset;
};

constexpr int64_t kScalesBlock = 256;

// Rows of W, decoded. `out` holds them from `first_row` on, contiguous, as fp32 or, where is_narrow, in the 16-bit type
// that they are rounded to.
struct UnpackParams {
  PackedWeight weight;
  void* out;
  int64_t first_row;
  bool is_narrow;
};

// y = x Wᵀ + bias + s Bᵀ for some rows of x. bias and s may be null. Rows of x and s end with zeros, up to
// kPaddedColumns.
struct PackedLinearParams {
  PackedWeight weight;
  const float* x;  // [rows, k]; for `decode` as arrange_x lays it out
  int64_t x_stride;
  const float* bias;
  const float* s;  // [rows, rank]; scaled
  int64_t s_stride;
  const float* b;  // [n, rank]
  int64_t b_stride;
  float* y;  // [rows, n], contiguous
  int64_t rows, rank;
};

constexpr int64_t kPaddedColumns = 32;

inline int64_t padded(int64_t columns) { return (columns + kPaddedColumns - 1) / kPaddedColumns * kPaddedColumns; }

// Whether `decode` serves this weight: its lanes hold weights that lie together.
inline bool decodes_in_registers(const PackedWeight& w) { return w.block >= 32 && (w.block & (w.block - 1)) == 0; }

}  // namespace lk

namespace lk::cpu {

struct PackedWeightKernels {
  // Rows [begin, end) of W.
  void (*unpack)(const UnpackParams&, int64_t begin, int64_t end);

  // Columns [begin, end) of y, with weights that are decoded in registers.
  void (*decode)(const PackedLinearParams&, int64_t begin, int64_t end);

  // A row of x in the order in which `decode` has weights in its lanes: of arranged_width numbers.
  void (*arrange_x)(const float* x, int64_t k, float* arranged);
  int64_t (*arranged_width)(int64_t k);

  // Columns [begin, end) of y, with weights that are decoded into the nearest cache a few rows at a time.
  void (*multiply)(const PackedLinearParams&, int64_t begin, int64_t end);
};

}  // namespace lk::cpu
