// Rows of numbers of any floating-point type: conversion and sums, for the CPU kernels that move them.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../params/common.h"
#include "float_types.h"

namespace lk::cpu {

// Columns that are summed at a time, in a buffer that stays in the first-level cache.
constexpr int64_t kSumColumns = 2048;

template <class F>
auto with_float_type(FloatType type, const F& f) {
  switch (type) {
    case FloatType::kFloat32:
      return f(float{});
    case FloatType::kBFloat16:
      return f(BFloat16{});
    case FloatType::kFloat16:
      return f(Float16{});
    case FloatType::kFloat64:
      break;
  }
  return f(double{});
}

inline int64_t size_of(FloatType type) {
  return with_float_type(type, [](auto zero) -> int64_t { return sizeof zero; });
}

template <class To, class From>
void convert_row(To* __restrict to, const From* __restrict from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = convert<To>(from[i]);
}

inline void copy_row(void* to, FloatType to_type, const void* from, FloatType from_type, int64_t n) {
  if (n == 0) return;  // memory of no elements may be null, which memcpy must not be given
  if (to_type == from_type) {
    memcpy(to, from, n * size_of(to_type));
    return;
  }
  with_float_type(to_type, [&](auto to_zero) {
    with_float_type(from_type, [&](auto from_zero) {
      convert_row(static_cast<decltype(to_zero)*>(to), static_cast<const decltype(from_zero)*>(from), n);
    });
  });
}

// sum += rows[0] + ... + rows[kRows - 1], one after the other: several at a time only save trips to the buffer.
template <int kRows, class Sum, class T>
void add_rows(Sum* __restrict sum, const T* const* rows, int64_t n) {
  const T* __restrict row[kRows];
  std::copy_n(rows, kRows, row);
  for (int64_t i = 0; i < n; ++i) {
    Sum total = sum[i];
    for (int k = 0; k < kRows; ++k) total += convert<Sum>(row[k][i]);
    sum[i] = total;
  }
}

template <class T>
using Rows = std::vector<const T*>;

// out = the sum of these rows in this order. Float64 is summed in float64, all else in float32.
template <class T, class Out>
void sum_rows(Out* out, Rows<T>& rows, int64_t n) {
  using Sum = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<Out, double>, double, float>;
  Sum sum[kSumColumns];
  for (int64_t c = 0; c < n; c += kSumColumns) {
    const int64_t width = std::min(kSumColumns, n - c);
    std::fill_n(sum, width, Sum{0});
    const size_t count = rows.size();
    size_t k = 0;
    for (; k + 4 <= count; k += 4) add_rows<4>(sum, &rows[k], width);
    for (; k < count; ++k) add_rows<1>(sum, &rows[k], width);
    convert_row(out + c, sum, width);
    for (const T*& row : rows) row += width;
  }
}

}  // namespace lk::cpu
