// The product of a few rows with a packed weight, without the vendor library.
#pragma once

#include <cstring>

#include "cpu_decode.h"
#include "packed_weight.h"

namespace lk {

// scaling · s Bᵀ: s [rows, rank] and b [n, rank] in fp32, s contiguous, b with unit column stride.
struct PackedBranch {
  Tensor s, b;
  double scaling;
};

// Rows [rows, columns] at `out`, `width` apart: times `factor`, then zeros.
inline void copy_padded(const Tensor& rows, float factor, float* out, int64_t width) {
  const int64_t columns = rows.size(1);
  for (int64_t m = 0; m < rows.size(0); ++m, out += width) {
    const float* row = floats(rows) + m * rows.stride(0);
    for (int64_t c = 0; c < columns; ++c) out[c] = factor * row[c];
    std::memset(out + columns, 0, sizeof(float) * (width - columns));
  }
}

// The same with rows of bf16 as they are.
inline void copy_padded(const Tensor& rows, uint16_t* out, int64_t width) {
  const int64_t columns = rows.size(1);
  for (int64_t m = 0; m < rows.size(0); ++m, out += width) {
    const uint16_t* row = static_cast<const uint16_t*>(rows.const_data_ptr()) + m * rows.stride(0);
    std::memcpy(out, row, sizeof(uint16_t) * columns);
    std::memset(out + columns, 0, sizeof(uint16_t) * (width - columns));
  }
}

// y = x Wᵀ + bias + the branch, in fp32; x is fp32 or 16-bit. Weights are decoded in registers where that is asked for
// and their blocks allow it, else a few rows at a time.
inline Tensor multiply_packed(const Tensor& x_rows, const PackedWeight& weight, const std::optional<Tensor>& bias,
                              const PackedBranch* branch, bool in_registers) {
  const cpu::PackedWeightKernels& kernels = *cpu::kernels().packed;
  const bool decodes = in_registers && decodes_in_registers(weight);
  const bool is_bf16 = !decodes && kernels.multiply_bf16 != nullptr && x_rows.scalar_type() == ScalarType::BFloat16;
  const Tensor x = !is_bf16                ? as_float_rows(x_rows)
                   : x_rows.stride(1) == 1 ? x_rows
                                           : torch::stable::contiguous(x_rows);
  const int64_t rows = x.size(0), rank = branch != nullptr ? branch->b.size(1) : 0;
  const bool copies = decodes || weight.k % kPaddedColumns != 0;
  const int64_t width = copies ? padded(weight.k) : 0;
  const Scratch scratch(sizeof(float) * rows * (width + padded(rank)));
  float* x_copy = static_cast<float*>(scratch.data());
  float* s_copy = x_copy + rows * width;
  if (decodes) {
    for (int64_t m = 0; m < rows; ++m) kernels.arrange_x(weight, floats(x) + m * x.stride(0), x_copy + m * width);
  } else if (copies && is_bf16) {
    copy_padded(x, reinterpret_cast<uint16_t*>(x_copy), width);
  } else if (copies) {
    copy_padded(x, 1.0f, x_copy, width);
  }

  const Tensor y = new_empty_as(x, {rows, weight.n}, ScalarType::Float);
  std::optional<Tensor> bias_row;
  if (bias) bias_row = torch::stable::contiguous(cast(*bias, ScalarType::Float));
  PackedLinearParams p{};
  p.weight = weight;
  p.x = copies ? x_copy : x.const_data_ptr();
  p.x_stride = copies ? width : x.stride(0);
  p.bias = bias_row ? floats(*bias_row) : nullptr;
  p.y = mutable_floats(y);
  p.rows = rows;
  if (branch != nullptr) {
    copy_padded(branch->s, static_cast<float>(branch->scaling), s_copy, padded(rank));
    p.s = s_copy;
    p.s_stride = padded(rank);
    p.b = floats(branch->b);
    p.b_stride = branch->b.stride(0);
    p.rank = rank;
  }
  static cpu::RegionPrice price_decoding, price_of_bf16, price;
  for_columns(weight.n, rows * (weight.k + rank),
              decodes   ? price_decoding
              : is_bf16 ? price_of_bf16
                        : price,
              [&](int64_t begin, int64_t end) {
                (decodes ? kernels.decode : is_bf16 ? kernels.multiply_bf16 : kernels.multiply)(p, begin, end);
              });
  return y;
}

}  // namespace lk
