// dequantize's parameters.
#pragma once

#include "common.h"
#include "packed_weight.h"

namespace lk {

// Which weights of a matrix, counted row by row: runs of neighbours, `stride` apart, the first from `first` on.
struct WeightRuns {
  int64_t first, count, length, stride;
};

// Rows lie one behind the other: they are one run.
constexpr WeightRuns rows_of(const PackedParts& w, int64_t begin, int64_t end) {
  const int64_t length = (end - begin) * w.k;
  return {.first = begin * w.k, .count = 1, .length = length, .stride = length};
}
constexpr WeightRuns columns_of(const PackedParts& w, int64_t begin, int64_t end) {
  return {.first = begin, .count = w.n, .length = end - begin, .stride = w.k};
}

// The weights of `runs` one behind the other, each rounded once, to `type`.
struct DequantizeParams {
  PackedParts weight;
  WeightRuns runs;
  FloatType type;
  void* out;  // [count, length], contiguous
};

}  // namespace lk
