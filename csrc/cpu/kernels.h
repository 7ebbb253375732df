// The CPU kernels as a table of functions: one table per instruction set, chosen once at run time.
#pragma once

#include <cstdint>

#include "../params.h"

namespace lk::cpu {

struct Kernels {
  const char* isa;
  // Rows [begin, end) of the mask.
  void (*dropout_mask)(const DropoutMaskParams&, int64_t begin, int64_t end);
  // Rows [begin, end) of s. `packed_a` comes from pack_a and is shared by all threads.
  void (*dropout_shrink)(const DropoutShrinkParams&, const float* packed_a, int64_t begin, int64_t end);
  void (*pack_a)(const DropoutShrinkParams&, float* packed_a);
  int64_t (*packed_a_size)(int64_t rank, int64_t k);
  // Column tiles [begin, end): each belongs to one thread, which adds up its rows in order, so that grad_a does not
  // depend on the number of threads.
  void (*dropout_backward)(const DropoutBackwardParams&, float* scratch, int64_t begin, int64_t end);
  int64_t (*backward_scratch_size)(int64_t rank);
  int64_t backward_tile_columns;
};

const Kernels& kernels();

}  // namespace lk::cpu
