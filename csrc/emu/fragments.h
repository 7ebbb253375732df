// What a warp's matrix instructions compute from its lanes' registers.
#pragma once

#include "machine_parts.h"
#include "ptx/core.h"

namespace lk::emu {

// How often shared memory is accessed for one 8x8 matrix of a load, at most. Its banks are 128 bytes wide together: the
// eight rows of 16 bytes come at once where no two lie in the same part of these.
inline int turns(const Operands (&operands)[kLanes]) {
  constexpr int kRows = 8, kRowBytes = 16;
  int most = 0;
  for (int matrix = 0; matrix < kLanes; matrix += kRows) {
    int accesses[kRows] = {};
    for (int lane = matrix; lane < matrix + kRows; ++lane) {
      const auto is_same = [&](const Operands& o) { return o.address == operands[lane].address; };
      if (std::any_of(operands + matrix, operands + lane, is_same)) continue;  // a row is read once for all
      most = std::max(most, ++accesses[operands[lane].address / kRowBytes % kRows]);
    }
  }
  return most;
}

inline void transfer_matrices(const uint16_t (&rows)[kLanes][8], bool transposed, const Operands (&operands)[kLanes]) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const auto* matrix = rows + i * 8;
      const uint32_t low = transposed ? matrix[column][row] : matrix[row][column];
      const uint32_t high = transposed ? matrix[column + 1][row] : matrix[row][column + 1];
      operands[lane].r[i] = low | high << 16;
    }
  }
}

// Adds a[16, depth] b[depth, 8] to the lanes' accumulators.
template <int kDepth>
void add_product(const float (&a)[16][kDepth], const float (&b)[kDepth][8], const Operands (&operands)[kLanes]) {
  float product[16][8] = {};
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < kDepth; ++k) {
      for (int n = 0; n < 8; ++n) product[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) operands[lane].d[i] += product[group + i / 2 * 8][pair + i % 2];
  }
}

template <class Format>
void multiply_add_fragments(const Operands (&operands)[kLanes]) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const Operands& o = operands[lane];
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      float* target = &a[group + i % 2 * 8][pair + i / 2 * 8];
      target[0] = Format::low(o.a[i]);
      target[1] = Format::high(o.a[i]);
    }
    for (int i = 0; i < 2; ++i) {
      b[pair + i * 8][group] = Format::low(o.b[i]);
      b[pair + i * 8 + 1][group] = Format::high(o.b[i]);
    }
  }
  add_product(a, b, operands);
}

// Fragments of mma.m16n8k8. The tensor cores do not see the bits of an operand that tf32 has not.
inline void multiply_add_tf32_fragments(const Operands (&operands)[kLanes]) {
  float a[16][8], b[8][8];
  const auto seen = [](uint32_t bits) { return float_of(bits & ~0x1FFFu); };
  for (int lane = 0; lane < kLanes; ++lane) {
    const Operands& o = operands[lane];
    const int group = lane / 4, k = lane % 4;
    for (int i = 0; i < 4; ++i) a[group + i % 2 * 8][k + i / 2 * 4] = seen(o.a[i]);
    for (int i = 0; i < 2; ++i) b[k + i * 4][group] = seen(o.b[i]);
  }
  add_product(a, b, operands);
}

}  // namespace lk::emu
