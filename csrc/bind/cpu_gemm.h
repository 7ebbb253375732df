// The base GEMMs of the CPU ops, one block of rows at a time.
//
// Schedule "aten" hands the operands to the library that ATen was built with, as they are. Schedule "onednn" hands them
// to oneDNN, which torch carries too. "native" is "aten" for 16-bit operands of a CPU that multiplies such. Schedule
// "upcast" is for 16-bit operands on a CPU without 16-bit arithmetic: the caller passes fp32 rows, and W goes through
// fp32 a few megabytes at a time. So does a packed weight (packed_weight.h) under every schedule, in x's dtype.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <string>

#include "aten.h"

// Of torch's inductor/aoti_torch/c/shim_cpu.h, which cannot be included here. Absent from a torch without oneDNN.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, const char* attr, const double** scalars,
    int64_t scalars_len, const char** algorithm, AtenTensorHandle* out);
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_cpu__linear_pointwise_binary(AtenTensorHandle x, AtenTensorHandle other, AtenTensorHandle weight,
                                        AtenTensorHandle* bias, const char* attr, AtenTensorHandle* out);

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
  const std::optional<Tensor> row = contiguous(bias);
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

// Rows of W that are held in another form at a time.
inline int64_t panel_rows(int64_t k) {
  return std::max<int64_t>(64, kUpcastWeightElements / std::max<int64_t>(1, k) / 64 * 64);
}

// A weight is what has n(), k(), and for_panels(dtype, f), which calls f(rows of W in this dtype, row begin, row end)
// for one panel after the other, at least once. This is a plain one.
class PlainMatrix {
 public:
  explicit PlainMatrix(const Tensor& weight) : weight_(weight) {}

  int64_t n() const { return weight_.size(0); }
  int64_t k() const { return weight_.size(1); }

  template <class F>
  void for_panels(ScalarType dtype, const F& f) const {
    if (weight_.scalar_type() == dtype) return f(weight_, 0, n());
    const int64_t step = panel_rows(k());
    int64_t begin = 0;
    do {
      const int64_t end = std::min(n(), begin + step);
      f(cast(row_block(weight_, begin, end), dtype), begin, end);
      begin = end;
    } while (begin < n());
  }

 private:
  const Tensor& weight_;
};

inline std::optional<Tensor> elements_of(std::optional<Tensor> bias, int64_t begin, int64_t end) {
  if (!bias || bias->size(0) == end - begin) return bias;
  return torch::stable::narrow(*bias, 0, begin, end - begin);
}

// y = x Wᵀ + bias. `epilogue(block, column begin, column end)` may add to a block of y before it is rounded.
template <class Weight, class Epilogue>
void linear(const Tensor& y, const Tensor& x, const Weight& weight, const std::optional<Tensor>& bias,
            const Epilogue& epilogue) {
  const bool rounds = y.scalar_type() != x.scalar_type();
  weight.for_panels(x.scalar_type(), [&](const Tensor& w, int64_t begin, int64_t end) {
    Tensor target = column_block(y, begin, end);
    const Tensor block = rounds ? new_empty_as(x, {x.size(0), end - begin}) : target;
    std::optional<Tensor> b = elements_of(bias, begin, end);
    if (b) b = cast(*b, x.scalar_type());
    linear_same_dtype(block, x, w, b);
    epilogue(block, begin, end);
    if (rounds) torch::stable::copy_(target, block);
  });
}

// x Wᵀ + bias by oneDNN.
template <class Weight>
Tensor onednn_linear(const Tensor& x, const Weight& weight, const std::optional<Tensor>& bias) {
  std::optional<Tensor> y;
  weight.for_panels(x.scalar_type(), [&](const Tensor& w, int64_t begin, int64_t end) {
    const Tensor block = onednn_linear(x, w, elements_of(bias, begin, end));
    if (end - begin == weight.n()) {
      y = block;
      return;
    }
    if (!y) y = new_empty_as(x, {x.size(0), weight.n()});
    Tensor target = column_block(*y, begin, end);
    torch::stable::copy_(target, block);
  });
  return *y;
}

// a + b, in the wider of their dtypes.
inline Tensor added(const Tensor& a, const Tensor& b) {
  AtenTensorHandle sum;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_add_Tensor(a.get(), b.get(), 1.0, &sum));
  return Tensor(sum);
}

// grad_x = grad_y W, in grad_y's dtype. A sum over panels is made in fp32.
template <class Weight>
void linear_backward(const Tensor& grad_x, const Tensor& grad_y, const Weight& weight) {
  const ScalarType dtype = grad_y.scalar_type();
  std::optional<Tensor> sum;
  weight.for_panels(dtype, [&](const Tensor& w, int64_t begin, int64_t end) {
    if (end - begin == weight.n()) {
      mm_out(grad_x, grad_y, w);
    } else if (is_fp32(grad_x)) {
      addmm_out(grad_x, grad_x, column_block(grad_y, begin, end), w, begin == 0 ? 0.0 : 1.0, 1.0);
    } else {
      mm_out(grad_x, column_block(grad_y, begin, end), w);
      sum = sum ? added(*sum, grad_x) : cast(grad_x, ScalarType::Float);
    }
  });
  if (sum) {
    Tensor target = grad_x;
    torch::stable::copy_(target, *sum);
  }
}

// grad_x += grad_y W, in fp32 where W goes through fp32 in panels.
template <class Weight>
void add_linear_backward(const Tensor& grad_x, const Tensor& grad_y, const Weight& weight) {
  weight.for_panels(grad_y.scalar_type(), [&](const Tensor& w, int64_t begin, int64_t end) {
    addmm_out(grad_x, grad_x, column_block(grad_y, begin, end), w, 1.0, 1.0);
  });
}

// sum + x Wᵀ by oneDNN, in a tensor of its own; sum is dense.
inline Tensor onednn_linear_plus(const Tensor& sum, const Tensor& x, const Tensor& w) {
  if (aoti_torch_cpu__linear_pointwise_binary == nullptr || w.numel() == 0)
    return added(sum, onednn_linear(x, w, std::nullopt));
  const Tensor weight = dense(w);
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu__linear_pointwise_binary(x.get(), sum.get(), weight.get(), nullptr, "add", &out));
  return Tensor(out);
}

// grad_y W by oneDNN.
template <class Weight>
Tensor onednn_linear_backward(const Tensor& grad_y, const Weight& weight) {
  std::optional<Tensor> sum;
  weight.for_panels(grad_y.scalar_type(), [&](const Tensor& w, int64_t begin, int64_t end) {
    const Tensor part = onednn_linear(column_block(grad_y, begin, end), transposed(w), std::nullopt);
    sum = sum ? added(*sum, part) : part;
  });
  return *sum;
}

// x Wᵀ + bias by a schedule.
template <class Weight>
Tensor base_forward(const Tensor& x, const Weight& weight, const std::optional<Tensor>& bias,
                    const std::string& schedule) {
  const bool upcast = schedule == "upcast";
  const Tensor rows = as_rows(x);
  if (schedule == "onednn") return with_leading_sizes_of(onednn_linear(rows, weight, bias), x);
  const Tensor y = new_empty_as(x, {rows.size(0), weight.n()});
  for_row_blocks(rows.size(0), upcast, [&](int64_t m0, int64_t m1) {
    const Tensor block = row_block(rows, m0, m1);
    linear(row_block(y, m0, m1), upcast ? cast(block, ScalarType::Float) : block, weight, bias, [](const auto&...) {});
  });
  return with_leading_sizes_of(y, x);
}

// grad_y W by a schedule.
template <class Weight>
Tensor base_backward(const Tensor& grad_y, const Weight& weight, const std::string& schedule) {
  const bool upcast = schedule == "upcast";
  const Tensor rows = as_rows(grad_y);
  if (schedule == "onednn") return with_leading_sizes_of(onednn_linear_backward(rows, weight), grad_y);
  const Tensor grad_x = new_empty_as(grad_y, {rows.size(0), weight.k()});
  for_row_blocks(rows.size(0), upcast, [&](int64_t m0, int64_t m1) {
    const Tensor grad = row_block(rows, m0, m1);
    Tensor target = row_block(grad_x, m0, m1);
    if (!upcast) {
      linear_backward(target, grad, weight);
      return;
    }
    const Tensor sum = new_empty_as(grad, {m1 - m0, weight.k()}, ScalarType::Float);
    linear_backward(sum, cast(grad, ScalarType::Float), weight);
    torch::stable::copy_(target, sum);
  });
  return with_leading_sizes_of(grad_x, grad_y);
}

}  // namespace lk
