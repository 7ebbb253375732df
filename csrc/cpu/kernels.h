// The CPU kernels as a table of functions: one table per instruction set, chosen once at run time.
#pragma once

#include <cstdint>

#include "../params.h"

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

  // Columns [begin, end) of y.
  void (*lora_decode)(const LoraDecodeParams&, int64_t begin, int64_t end);

  // Column tiles [begin, end) of grad and grad_x, each lora_grad_tile columns wide. A tile belongs to one thread, which
  // adds up its rows in order: the result does not depend on the number of threads.
  void (*lora_grad)(const LoraGradParams&, float* scratch, int64_t begin, int64_t end);
  int64_t (*lora_grad_tile)(bool has_dropout);
  int64_t (*lora_grad_scratch_size)(int64_t rank, int64_t tiles);
};

const Kernels& kernels();

}  // namespace lk::cpu
