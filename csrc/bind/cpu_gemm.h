// The base GEMMs of the CPU ops, one block of rows at a time.
//
// Schedule "aten" hands the operands to the library that ATen was built with, as they are. Schedule "onednn" hands them
// to oneDNN, which torch carries too. "native" is "aten" for 16-bit operands of a CPU that multiplies such. Schedule
// "upcast" is for 16-bit weights on a CPU without 16-bit arithmetic: the caller passes fp32 rows, and W goes through
// fp32 a few megabytes at a time.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>

#include "aten.h"

// Of torch's inductor/aoti_torch/c/shim_cpu.h, which cannot be included here. Absent from a torch without oneDNN.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, const char* attr, const double** scalars,
    int64_t scalars_len, const char** algorithm, AtenTensorHandle* out);

namespace lk {

constexpr int64_t kRowBlock = 1024;                 // rows of a 16-bit matrix that are held in fp32 at a time
constexpr int64_t kUpcastWeightElements = 1 << 20;  // elements of W held in fp32 at a time: 4 MB

inline void mm_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// out = beta · self + alpha · a · b; self may be out.
inline void addmm_out(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b, double beta,
                      double alpha) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), self.get(), a.get(), b.get(), beta, alpha));
}

inline void linear_same_dtype(const Tensor& y, const Tensor& x, const Tensor& weight,
                              const std::optional<Tensor>& bias) {
  if (bias) {
    addmm_out(y, *bias, x, transposed(weight), 1.0, 1.0);
  } else {
    mm_out(y, x, transposed(weight));
  }
}

inline bool has_onednn() { return aoti_torch_cpu__linear_pointwise != nullptr; }

// oneDNN multiplies by plain loops, a thousand times slower, where neither rows nor columns lie one behind the other.
inline Tensor dense(const Tensor& t) {
  const bool rows = t.stride(1) == 1 && t.stride(0) == t.size(1),
             columns = t.stride(0) == 1 && t.stride(1) == t.size(0);
  return rows || columns ? t : torch::stable::contiguous(t);
}

// x Wᵀ + bias by oneDNN, in a tensor of its own. Operands are fp32; W may be a transposed view.
inline Tensor onednn_linear(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(has_onednn() && is_fp32(x), "the onednn schedule serves fp32, in a torch that has oneDNN");
  if (w.numel() == 0) {  // of no columns, oneDNN leaves the result unwritten
    const Tensor y = new_empty_as(x, {x.size(0), w.size(0)});
    linear_same_dtype(y, x, w, bias);
    return y;
  }
  const Tensor weight = dense(w);
  // oneDNN does not look at the bias's stride.
  const std::optional<Tensor> row = bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
  AtenTensorHandle out, bias_handle = row ? row->get() : nullptr;
  const char* algorithm = "";
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(x.get(), weight.get(), row ? &bias_handle : nullptr,
                                                                 "none", nullptr, 0, &algorithm, &out));
  return Tensor(out);
}

// Calls f(row begin, row end): all rows at once where nothing is converted, else kRowBlock at a time.
template <class F>
void for_row_blocks(int64_t rows, bool converts, const F& f) {
  const int64_t step = converts ? kRowBlock : std::max<int64_t>(rows, 1);
  for (int64_t begin = 0; begin < rows; begin += step) f(begin, std::min(rows, begin + step));
}

// Calls f(fp32 rows of W, row begin, row end).
template <class F>
void for_weight_blocks_fp32(const Tensor& weight, const F& f) {
  const int64_t n = weight.size(0), k = std::max<int64_t>(1, weight.size(1));
  const int64_t step = std::max<int64_t>(64, kUpcastWeightElements / k / 64 * 64);
  for (int64_t begin = 0; begin < n; begin += step) {
    const int64_t end = std::min(n, begin + step);
    f(cast(row_block(weight, begin, end), ScalarType::Float), begin, end);
  }
}

// y = x Wᵀ + bias. `epilogue(block, column begin, column end)` may add to a block of y before it is rounded.
template <class Epilogue>
void linear(const Tensor& y, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
            const Epilogue& epilogue) {
  if (x.scalar_type() == weight.scalar_type()) {
    linear_same_dtype(y, x, weight, bias);
    epilogue(y, 0, y.size(1));
    return;
  }
  for_weight_blocks_fp32(weight, [&](const Tensor& w, int64_t begin, int64_t end) {
    const Tensor block = new_empty_as(x, {x.size(0), end - begin});
    std::optional<Tensor> b = bias;
    if (b) b = cast(torch::stable::narrow(*b, 0, begin, end - begin), ScalarType::Float);
    linear_same_dtype(block, x, w, b);
    epilogue(block, begin, end);
    Tensor target = column_block(y, begin, end);
    torch::stable::copy_(target, block);
  });
}

// grad_x = grad_y W, in grad_y's dtype.
inline void linear_backward(const Tensor& grad_x, const Tensor& grad_y, const Tensor& weight) {
  if (grad_y.scalar_type() == weight.scalar_type()) {
    mm_out(grad_x, grad_y, weight);
    return;
  }
  if (weight.size(0) == 0) {  // no block would write
    Tensor all = grad_x;
    torch::stable::zero_(all);
    return;
  }
  for_weight_blocks_fp32(weight, [&](const Tensor& w, int64_t begin, int64_t end) {
    addmm_out(grad_x, grad_x, column_block(grad_y, begin, end), w, begin == 0 ? 0.0 : 1.0, 1.0);
  });
}

}  // namespace lk
