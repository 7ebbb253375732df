// The CPU kernels as a table of functions: one table per instruction set, chosen once at run time.
#pragma once

#include <cstdint>

#include "../params/cross_entropy_rows.h"
#include "../params/dropout_mask.h"
#include "../philox.h"
#include "gated_activation.h"
#include "packed_weight.h"

namespace lk {

// The narrow products of a LoRA branch on the CPU, in fp32. Without dropout `mask` is all ones and its scale 1.

// s[m, :] = (mask ∘ x)[m, :] · Wᵀ, times the mask's scale; `packed` is W [rank, k] as pack_transposed lays it out.
struct LoraShrinkParams {
  const float* x;  // [rows, k]
  int64_t x_stride;
  const float* packed;
  float* s;  // [rows, rank]
  int64_t s_stride;
  int64_t rows, k, rank;
  bool has_dropout;
  int64_t first_row;  // of x within the matrix that the mask belongs to
  Dropout dropout;
  const int64_t* row_ids = nullptr;  // of each row there, where they do not follow each other
};

// y = base + bias + alpha · s · B for rows of n; `packed` is B [rank, n] as pack_transposed lays out Bᵀ.
struct LoraExpandParams {
  const float* base;  // may be y
  int64_t base_stride;
  const float* bias;  // null: none
  const float* s;     // [rows, rank], contiguous
  const float* packed;
  float alpha;
  float* y;
  int64_t y_stride;
  int64_t n, rank;
  const int64_t* row_ids = nullptr;  // where each row of s belongs in base and y, if they do not follow each other
};

// grad[j, c] += alpha · sum over m of s[m, j] · (mask ∘ x)[m, c], and, while the mask is at hand,
// grad_x += alpha · mask ∘ (s · A). Either part may be absent.
struct LoraGradParams {
  const float* x;  // [rows, k]; null where grad is not wanted
  int64_t x_stride;
  const float* s;  // [rows, rank]
  int64_t s_stride;
  float* grad;  // element (j, c) at grad[j * grad_stride_j + c * grad_stride_c]
  int64_t grad_stride_j, grad_stride_c;
  const float* a;  // [rank, k]; null where grad_x is not wanted
  int64_t a_stride;
  float* grad_x;  // [rows, k]
  int64_t grad_x_stride;
  float alpha;
  int64_t rows, k, rank;
  bool has_dropout;
  int64_t first_row;
  Dropout dropout;
  const int64_t* row_ids = nullptr;
};

// y = x Wᵀ + bias + alpha · s Bᵀ for a few rows of x. bias and s may be null.
struct LoraDecodeParams {
  const float* x;  // [rows, k]
  int64_t x_stride;
  const float* w;  // [n, k]
  int64_t w_stride;
  const float* bias;
  const float* s;  // [rows, rank], contiguous
  const float* b;  // [n, rank]
  int64_t b_stride;
  float alpha;
  float* y;  // [rows, n], contiguous
  int64_t rows, n, k, rank;
};

}  // namespace lk

namespace lk::cpu {

struct Kernels {
  const char* isa;

  // Rows [begin, end) of the mask.
  void (*dropout_mask)(const DropoutMaskParams&, int64_t begin, int64_t end);

  // W [rank, k], element (j, c) at w[j * stride_j + c * stride_c], transposed to [k, rank] and padded with zeros.
  void (*pack_transposed)(const float* w, int64_t stride_j, int64_t stride_c, int64_t rank, int64_t k, float* packed);
  int64_t (*packed_size)(int64_t rank, int64_t k);

  // Rows [begin, end) of s.
  void (*lora_shrink)(const LoraShrinkParams&, int64_t begin, int64_t end);

  // Rows [begin, end) of s.
  void (*lora_expand)(const LoraExpandParams&, int64_t begin, int64_t end);

  // Columns [begin, end) of y.
  void (*lora_decode)(const LoraDecodeParams&, int64_t begin, int64_t end);

  // Column tiles [begin, end) of grad and grad_x, each lora_grad_tile columns wide. A tile belongs to one thread, which
  // adds up its rows in order: the result does not depend on the number of threads.
  void (*lora_grad)(const LoraGradParams&, float* scratch, int64_t begin, int64_t end);
  int64_t (*lora_grad_tile)(bool has_dropout);
  int64_t (*lora_grad_scratch_size)(int64_t rank, int64_t tiles);

  // Rows [begin, end) of logits; the gradient, in fp32, takes their place.
  void (*cross_entropy_rows)(const CrossEntropyParams&, int64_t begin, int64_t end);

  const PackedWeightKernels* packed;
  const GatedActivationKernels* gated;
};

const Kernels& kernels();

}  // namespace lk::cpu
