// Plain parameter structs, one per kernel. No torch, no CUDA: strides are in elements, rows are contiguous.
#pragma once

#include <cstdint>

#include "philox.h"

namespace lk {

// keep[m, k] = whether element (m, k) of a [rows, columns] matrix survives dropout.
struct DropoutMaskParams {
  bool* keep;
  int64_t rows, columns;
  Dropout dropout;
};

// s[m, :] = dropout(x)[m, :] · Aᵀ for rows of x that start at row `first_row` of the whole matrix.
struct DropoutShrinkParams {
  const float* x;  // [rows, k]
  int64_t x_stride;
  const float* a;  // [rank, k]
  int64_t a_stride;
  float* s;  // [rows, rank], contiguous
  int64_t rows, k, rank, first_row;
  Dropout dropout;
};

// grad_x += alpha · mask ∘ (grad_s · A) and grad_a += alpha · grad_sᵀ · (mask ∘ x). The mask is made once for both.
struct DropoutBackwardParams {
  const float* x;  // [rows, k]; null where grad_a is not wanted
  int64_t x_stride;
  const float* a;  // [rank, k]; null where grad_x is not wanted
  int64_t a_stride;
  const float* grad_s;  // [rows, rank], contiguous
  float* grad_x;        // [rows, k]
  int64_t grad_x_stride;
  float* grad_a;  // [rank, k], contiguous
  float alpha;    // scaling times the dropout scale
  int64_t rows, k, rank, first_row;
  Dropout dropout;
};

}  // namespace lk
