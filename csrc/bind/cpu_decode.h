// The product of a few fp32 rows with a weight, without the vendor library.
#pragma once

#include <algorithm>

#include "../cpu/kernels.h"
#include "aten.h"

namespace lk {

inline const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
inline float* mutable_floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// fp32 with unit column stride, as the kernels want it.
inline Tensor as_float_rows(const Tensor& t) {
  const Tensor f = cast(t, ScalarType::Float);
  return f.stride(1) == 1 ? f : torch::stable::contiguous(f);
}

// A parallel region costs some microseconds: a thread gets at least so many multiply-adds.
constexpr int64_t kDecodeWork = 1 << 16;

// Columns of y, of so many multiply-adds each, that are worth a thread.
inline int64_t decode_grain(int64_t work) { return std::max<int64_t>(8, kDecodeWork / std::max<int64_t>(1, work)); }

inline void run_decode(const LoraDecodeParams& p) {
  const int64_t grain = decode_grain(p.rows * (p.k + p.rank));
  torch::stable::parallel_for(0, p.n, grain,
                              [&](int64_t begin, int64_t end) { cpu::kernels().lora_decode(p, begin, end); });
}

// y = x Wᵀ, with nothing added yet; unit column strides, y contiguous.
inline LoraDecodeParams decode_params(const Tensor& x, const Tensor& weight, float* y) {
  LoraDecodeParams p{};
  p.x = floats(x);
  p.x_stride = x.stride(0);
  p.rows = x.size(0);
  p.k = x.size(1);
  p.w = floats(weight);
  p.w_stride = weight.stride(0);
  p.y = y;
  p.n = weight.size(0);
  return p;
}

// rows Wᵀ + bias, in a tensor of its own.
inline Tensor decode_product(const Tensor& rows, const Tensor& w, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(is_fp32(rows), "the decode schedule serves fp32");
  const Tensor weight = w.stride(1) == 1 ? w : torch::stable::contiguous(w);
  const Tensor y = new_empty_as(rows, {rows.size(0), weight.size(0)});
  const std::optional<Tensor> bias_row = bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
  LoraDecodeParams p = decode_params(rows, weight, mutable_floats(y));
  p.bias = bias_row ? floats(*bias_row) : nullptr;
  run_decode(p);
  return y;
}

}  // namespace lk
