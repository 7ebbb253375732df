// Weights of few bits on the CPU: decoding, by a table of functions per instruction set.
#pragma once

#include <cstdint>

#include "../params/common.h"
#include "../params/packed_weight.h"

namespace lk {

// W [n, k] in fp32 is number · scale, one rounded product. `block` columns share a scale, and so do rows_per_scale
// rows.
//
// Layouts "codes4" and "codes4_low": two numbers share a byte, the first in the high or in the low half; they are
// indices of a code. "int8" and "e4m3": the numbers are bytes.
struct PackedWeight {
  PackedLayout layout;
  const uint8_t* data;
  const float* scales;  // [n / rows_per_scale, k / block], both rounded up; null where they are quantised themselves
  const float* code;    // [16]; null where the numbers are bytes
  int64_t n, k, block;  // in halves of bytes, k is a multiple of block, block of 2
  int64_t rows_per_scale;
  FloatType rounding;  // what each weight is rounded to, to nearest even; kFloat32 where it stays as it is
  // Quantised scales: scale b is code2[indices[b]] · scales2[b / kScalesPerScale2] + offset, of two rounded operations.
  const uint8_t* indices;  // as scales would be; null where the scales are not quantised
  const float* scales2;    // one for kScalesPerScale2 scales
  const float* code2;      // [256]
  float offset;
};

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
  const void* x;  // [rows, k] in fp32; for `decode` as arrange_x lays it out, for `multiply_bf16` in bf16
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

// Whether `decode` serves this weight: scales change between runs of weights, never within one.
inline bool decodes_in_registers(const PackedWeight& w) { return w.block % 32 == 0 || w.block >= w.k; }

}  // namespace lk

namespace lk::cpu {

struct PackedWeightKernels {
  // Rows [begin, end) of W.
  void (*unpack)(const UnpackParams&, int64_t begin, int64_t end);

  // Columns [begin, end) of y, with weights that are decoded in registers.
  void (*decode)(const PackedLinearParams&, int64_t begin, int64_t end);

  // A row of x [k] in the order in which `decode` has this weight in its lanes; then zeros, up to kPaddedColumns.
  void (*arrange_x)(const PackedWeight&, const float* x, float* arranged);

  // Columns [begin, end) of y, with weights that are decoded into the nearest cache a few rows at a time.
  void (*multiply)(const PackedLinearParams&, int64_t begin, int64_t end);

  // The same with an x and weights of bf16, which the CPU multiplies without widening them; null where it does not. It
  // takes subnormal numbers for zeros.
  void (*multiply_bf16)(const PackedLinearParams&, int64_t begin, int64_t end);
};

}  // namespace lk::cpu
