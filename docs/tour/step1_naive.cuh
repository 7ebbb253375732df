// Step 1, naive: a thread per element, in two launches. The equation, and nothing else.
//
//     launch 1    s = scaling · x aᵀ
//     launch 2    y = x wᵀ + bias + s bᵀ
//
// It is right, and the yardstick of the other steps. What it wastes:
// - A multiply-add reads two elements from memory. Each row of x is read n times, each row of w m times.
// - The lanes of a warp read rows of w that lie 2 k bytes apart: 32 sectors of 32 bytes, for two bytes of each.
// - It multiplies where the machine is slow: an fp32 unit does one multiply-add for an instruction and lane, the tensor
//   cores do 64 (2048 by one mma.sync of a warp).
#pragma once

#include "problem.h"

namespace lk::tour {

constexpr int kNaiveThreads = 128;

LK_DEVICE float dot(const uint16_t* p, const uint16_t* q, int depth) {
  float sum = 0.0f;
  for (int i = 0; i < depth; ++i) sum += BFloat16::low(load_global(p + i)) * BFloat16::low(load_global(q + i));
  return sum;
}

LK_DEVICE uint16_t rounded(float f) { return static_cast<uint16_t>(BFloat16::pack(f, 0.0f)); }

// Which element of a [.., columns] result is this thread's.
struct Element {
  int row, column;

  LK_DEVICE static Element of_thread(int columns) {
    const int i = block_index() * kNaiveThreads + thread_index();
    return {i / columns, i % columns};
  }
};

LK_KERNEL(kNaiveThreads, 1) step1_s(const Problem p) {
  const auto [row, column] = Element::of_thread(p.rank);
  if (row >= p.m) return;
  const float sum = dot(p.x + static_cast<int64_t>(row) * p.k, p.a + static_cast<int64_t>(column) * p.k, p.k);
  store_global(p.s + static_cast<int64_t>(row) * p.rank + column, rounded(p.scaling * sum));
}

// The launch before has ended, so that s is there: nothing in the kernel has to wait for it.
LK_KERNEL(kNaiveThreads, 1) step1_y(const Problem p) {
  const auto [row, column] = Element::of_thread(p.n);
  if (row >= p.m) return;
  float sum = dot(p.x + static_cast<int64_t>(row) * p.k, p.w + static_cast<int64_t>(column) * p.k, p.k);
  sum += dot(p.s + static_cast<int64_t>(row) * p.rank, p.b + static_cast<int64_t>(column) * p.rank, p.rank);
  store_global(p.y + static_cast<int64_t>(row) * p.n + column,
               rounded(sum + BFloat16::low(load_global(p.bias + column))));
}

}  // namespace lk::tour
