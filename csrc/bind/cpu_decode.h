// The product of a few fp32 rows with a weight, without the vendor library.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>

#include "../cpu/kernels.h"
#include "../cpu/region_price.h"
#include "aten.h"

namespace lk {

inline const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
inline float* mutable_floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// fp32 with unit column stride, as the kernels want it.
inline Tensor as_float_rows(const Tensor& t) {
  const Tensor f = cast(t, ScalarType::Float);
  return f.stride(1) == 1 ? f : torch::stable::contiguous(f);
}

// A thread gets at least so many multiply-adds, and columns.
constexpr int64_t kThreadWork = 1 << 16, kThreadColumns = 8;

inline int64_t nanoseconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
}

// f(begin, end) over columns [0, n) of `work` multiply-adds each, divided among threads where that pays. A column must
// not depend on where it is cut.
template <class F>
void for_columns(int64_t n, int64_t work, cpu::RegionPrice& price, const F& f) {
  using Turn = cpu::RegionPrice::Turn;
  const int64_t grain = std::max<int64_t>(kThreadColumns, kThreadWork / std::max<int64_t>(1, work));
  const Turn turn = n > grain ? price.next() : Turn::kAsKnown;
  if (n <= grain || (turn == Turn::kAsKnown && !price.pays(n * work))) {
    f(0, n);
    return;
  }
  if (turn != Turn::kTimed) {
    torch::stable::parallel_for(0, n, grain, f);
    return;
  }
  std::atomic<int64_t> all{0}, longest{0};
  const auto start = std::chrono::steady_clock::now();
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    const auto own_start = std::chrono::steady_clock::now();
    f(begin, end);
    const int64_t own = nanoseconds_since(own_start);
    all += own;
    for (int64_t most = longest; most < own && !longest.compare_exchange_weak(most, own);) {
    }
  });
  price.observe(nanoseconds_since(start), all, longest, n * work);
}

inline cpu::RegionPrice& decode_price() {
  static cpu::RegionPrice price;
  return price;
}

inline void run_decode(const LoraDecodeParams& p) {
  for_columns(p.n, p.rows * (p.k + p.rank), decode_price(),
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
  const std::optional<Tensor> bias_row = contiguous(bias);
  LoraDecodeParams p = decode_params(rows, weight, mutable_floats(y));
  p.bias = bias_row ? floats(*bias_row) : nullptr;
  run_decode(p);
  return y;
}

}  // namespace lk
