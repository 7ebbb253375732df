// The parameters of lora_linear's kernels and of its gradients'.
#pragma once

#include <cstdint>

namespace lk {

// y = x wᵀ + bias + scaling · s bᵀ with s = dropout(x) aᵀ, on tensor cores. Elements are bf16, fp16, or fp32 whose
// products are formed in tf32, as the kernel says; rows are `stride` elements apart.
//
// Also the gradient of x, dX = dY W + scaling · mask ∘ (s' A) with s' = dY B: then x is dY, w, a and b are W [k, n],
// B [k, rank] and A [rank, n] in memory, y is dX, and dropout acts on the branch.
struct LoraLinearParams {
  const void* x;     // [m, k]
  const void* w;     // [n, k]
  const void* a;     // [rank, k]
  const void* b;     // [n, rank]
  const void* bias;  // [n]; null: none
  void* y;           // [m, n]
  void* s;           // [m, rank], contiguous
  int64_t x_stride, w_stride, a_stride, b_stride, y_stride;
  int32_t m, n, k, rank;
  bool adapters_are_float;  // a and b are fp32, and rounded to 16-bit elements on the way
  float scaling;
  uint32_t dropout_threshold;
  float dropout_scale;
  const int64_t* seed;  // null: no dropout
  uint64_t seed_step;   // what the mask's seed is more than that: of a pack's member (member_seed)
  // Zero before the launch and again after it. Ticketed and column-0: tickets drawn, blocks done, then one flag per
  // block of rows. Dual and decode, where splits > 1: one per tile.
  uint32_t* counters;
  int32_t group_rows;  // blocks of rows whose tiles are drawn together
  // Dual, decode and shrink: the depth is cut into `splits` parts of split_depth.
  int32_t splits, split_depth;
  float* partials;  // of wgmma: where adapters of fp32 are rounded to
  // Gradient of x: s of the forward [m, rank], and where parts of dB = dYᵀ s go, one [k, 16] per block of rows. Null:
  // not wanted.
  const void* saved_s;
  float* partial_grad_b;
};

// dA = scaling · s'ᵀ dropout(x) and dB = scaling · dYᵀ s, on tensor cores. Null gradients are not wanted.
struct LoraGradsParams {
  const void* x;       // [m, k]
  const void* grad_y;  // [m, n]
  const void* s;       // [m, rank], contiguous; and s' = dY B
  const void* grad_s;
  void* grad_a;  // [rank, k], contiguous, elements like x or, if grads_are_float, float
  void* grad_b;  // [n, rank]
  int64_t x_stride, grad_y_stride;
  int32_t m, n, k, rank;
  bool grads_are_float;
  float scaling;
  uint32_t dropout_threshold;
  float dropout_scale;
  const int64_t* seed;          // null: no dropout
  uint64_t seed_step;           // as above
  int32_t splits, split_rows;   // the rows are cut into `splits` parts of split_rows
  float* partials;              // null if splits is 1
  uint32_t* counters;           // one per tile, zero before the launch and again after it
  const float* partial_grad_b;  // [parts_of_grad_b, n, 16]: dB is scaling · their sum; null: dB is computed here
  int32_t parts_of_grad_b;
};

}  // namespace lk
