// lora_linear and its gradients on CUDA: tensors to Params, the config for them, the launches.
#include <stdexcept>
#include <string>
#include <tuple>

#include "../launch/lora_linear.h"
#include "../philox.h"
#include "aten.h"
#include "cuda_counters.h"
#include "lora_checks.h"

namespace lk {
namespace {

float* floats_of(const Tensor& workspace) { return static_cast<float*>(workspace.mutable_data_ptr()); }

const int64_t* seed_of(const std::optional<Tensor>& seed) {
  return seed ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr;
}

// [..., n] -> [rows, n] as the kernels read it. Rows that lie further apart than they can reckon are copied.
Tensor matrix_of(const Tensor& t) {
  const Tensor rows = as_rows(t);
  return rows.stride(0) <= kMaxRowStride ? rows : torch::stable::contiguous(rows);
}

// An adapter as the kernels read it: fp32, or x's type.
Tensor adapter_rows(const Tensor& adapter, const Tensor& x) {
  return matrix_of(adapter.scalar_type() == ScalarType::Float ? adapter : cast(adapter, x.scalar_type()));
}

bool is_float(const Tensor& t) { return t.scalar_type() == ScalarType::Float; }

int element_bytes(const Tensor& t) { return is_float(t) ? 4 : 2; }

// Whether every row of every matrix begins where a chunk may.
bool rows_aligned(std::initializer_list<const Tensor*> matrices) {
  return std::all_of(matrices.begin(), matrices.end(), [](const Tensor* t) {
    return reinterpret_cast<uintptr_t>(t->const_data_ptr()) % kChunkBytes == 0 &&
           t->stride(0) % chunk_elements(element_bytes(*t)) == 0;
  });
}

// f(Element*) for the element type of x.
template <class F>
auto with_element(const Tensor& x, const F& f) {
  if (x.scalar_type() == ScalarType::BFloat16) return f(static_cast<BFloat16*>(nullptr));
  if (x.scalar_type() == ScalarType::Half) return f(static_cast<Float16*>(nullptr));
  if (is_float(x)) return f(static_cast<TensorFloat32*>(nullptr));
  throw std::runtime_error("lora_linear: the CUDA kernels serve bfloat16, float16 and, in tf32, float32");
}

template <class T>
using Pointee = std::remove_pointer_t<T>;

std::tuple<Tensor, Tensor> lora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B,
                                       std::optional<Tensor> bias, std::optional<Tensor> seed, double scaling,
                                       double dropout_p, std::string) {
  check_lora_linear(x, weight, lora_A, lora_B, bias, seed);
  const CudaCall call(x);
  const Tensor rows = matrix_of(x), w = matrix_of(weight), a = adapter_rows(lora_A, x), b = adapter_rows(lora_B, x);
  if (bias) bias = torch::stable::contiguous(*bias);
  const int64_t m = rows.size(0), k = rows.size(1), n = w.size(0), rank = a.size(0);
  const Tensor y = new_empty_as(x, {m, n}), s = new_empty_as(x, {m, rank});
  const bool aligned = whole_chunks(n, k, rank, element_bytes(x)) && rows_aligned({&rows, &w, &a, &b, &y, &s});
  const LoraLinearConfig config =
      lora_linear_config(m, n, k, rank, element_bytes(x), aligned, seed.has_value(), device_limits(call.device));
  if (config.blocks > 0) {
    const Counters counters(x, call, config.counters);
    const Tensor partials = new_empty_as(x, {config.partials}, ScalarType::Float);
    const Dropout dropout = make_dropout(0, dropout_p);
    const LoraLinearParams p{.x = rows.const_data_ptr(),
                             .w = w.const_data_ptr(),
                             .a = a.const_data_ptr(),
                             .b = b.const_data_ptr(),
                             .bias = bias ? bias->const_data_ptr() : nullptr,
                             .y = y.mutable_data_ptr(),
                             .s = s.mutable_data_ptr(),
                             .x_stride = rows.stride(0),
                             .w_stride = w.stride(0),
                             .a_stride = a.stride(0),
                             .b_stride = b.stride(0),
                             .y_stride = y.stride(0),
                             .m = static_cast<int32_t>(m),
                             .n = static_cast<int32_t>(n),
                             .k = static_cast<int32_t>(k),
                             .rank = static_cast<int32_t>(rank),
                             .adapters_are_float = is_float(a) && !is_float(x),
                             .scaling = static_cast<float>(scaling),
                             .dropout_threshold = dropout.threshold,
                             .dropout_scale = dropout.scale,
                             .seed = seed_of(seed),
                             .counters = counters.data(),
                             .group_rows = config.group_rows,
                             .splits = config.splits,
                             .split_depth = config.split_depth,
                             .partials = floats_of(partials),
                             .saved_s = nullptr,
                             .partial_grad_b = nullptr};
    const cudaError_t error =
        with_element(x, [&](auto* e) { return launch_lora_linear<Pointee<decltype(e)>>(p, config, call.stream); });
    counters.check(error, "lora_linear");
  }
  return {with_leading_sizes_of(y, x), with_leading_sizes_of(s, x)};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(Tensor grad_y, Tensor x, Tensor s, Tensor weight, Tensor lora_A,
                                                        Tensor lora_B, std::optional<Tensor> seed, double scaling,
                                                        double dropout_p, bool need_x, bool need_A, bool need_B,
                                                        std::string) {
  check_lora_linear_backward(grad_y, x, s, weight, lora_A, lora_B, seed);
  const CudaCall call(x);
  const Tensor gy = matrix_of(grad_y), rows = matrix_of(x), saved_s = torch::stable::contiguous(as_rows(s));
  const Tensor w = matrix_of(weight), a = adapter_rows(lora_A, x), b = adapter_rows(lora_B, x);
  const int64_t m = rows.size(0), k = rows.size(1), n = w.size(0), rank = a.size(0);
  const ScalarType grad_type = is_float(a) ? ScalarType::Float : x.scalar_type();
  const auto gradient = [&](bool need, const Tensor& like, int64_t size0, int64_t size1, ScalarType type) {
    return need ? new_empty_as(like, {size0, size1}, type) : new_empty_as(like, {0}, type);
  };
  const Tensor grad_x = gradient(need_x, x, m, k, x.scalar_type());
  const Tensor grad_a = gradient(need_A, x, rank, k, grad_type), grad_b = gradient(need_B, x, n, rank, grad_type);
  const auto result = [&] {
    return std::make_tuple(need_x ? with_leading_sizes_of(grad_x, x) : grad_x, cast(grad_a, lora_A.scalar_type()),
                           cast(grad_b, lora_B.scalar_type()));
  };
  if (m == 0) {
    for (const Tensor* t : {&grad_a, &grad_b}) {
      const size_t bytes = t->numel() * (grad_type == ScalarType::Float ? 4 : 2);
      if (bytes > 0) check_cuda(cudaMemsetAsync(t->mutable_data_ptr(), 0, bytes, call.stream), "cudaMemsetAsync");
    }
    return result();
  }

  const Tensor grad_s = new_empty_as(x, {m, rank});
  const bool aligned = whole_chunks(n, k, rank, element_bytes(x)) && rows_aligned({&gy, &rows, &saved_s, &w, &a, &b});
  const LoraBackwardConfig config =
      lora_backward_config(m, n, k, rank, aligned, need_x, need_A, need_B, device_limits(call.device));
  const Counters counters(x, call, config.grad_x.counters + config.grads.counters);
  const Tensor parts_of_grad_b = new_empty_as(x, {config.partial_grad_b}, ScalarType::Float);
  const Tensor partials = new_empty_as(x, {config.grads.partials}, ScalarType::Float);
  float* const partial_grad_b = config.parts_of_grad_b > 0 ? floats_of(parts_of_grad_b) : nullptr;
  const Dropout dropout = make_dropout(0, dropout_p);
  const LoraLinearParams p{.x = gy.const_data_ptr(),
                           .w = w.const_data_ptr(),
                           .a = b.const_data_ptr(),
                           .b = a.const_data_ptr(),
                           .bias = nullptr,
                           .y = grad_x.mutable_data_ptr(),
                           .s = grad_s.mutable_data_ptr(),
                           .x_stride = gy.stride(0),
                           .w_stride = w.stride(0),
                           .a_stride = b.stride(0),
                           .b_stride = a.stride(0),
                           .y_stride = k,
                           .m = static_cast<int32_t>(m),
                           .n = static_cast<int32_t>(need_x ? k : 0),
                           .k = static_cast<int32_t>(n),
                           .rank = static_cast<int32_t>(rank),
                           .adapters_are_float = is_float(a) && !is_float(x),
                           .scaling = static_cast<float>(scaling),
                           .dropout_threshold = dropout.threshold,
                           .dropout_scale = dropout.scale,
                           .seed = seed_of(seed),
                           .counters = counters.data(),
                           .group_rows = config.grad_x.group_rows,
                           .splits = config.grad_x.splits,
                           .split_depth = config.grad_x.split_depth,
                           .partials = nullptr,
                           .saved_s = saved_s.const_data_ptr(),
                           .partial_grad_b = partial_grad_b};
  const LoraGradsParams g{.x = rows.const_data_ptr(),
                          .grad_y = gy.const_data_ptr(),
                          .s = saved_s.const_data_ptr(),
                          .grad_s = grad_s.const_data_ptr(),
                          .grad_a = need_A ? grad_a.mutable_data_ptr() : nullptr,
                          .grad_b = need_B ? grad_b.mutable_data_ptr() : nullptr,
                          .x_stride = rows.stride(0),
                          .grad_y_stride = gy.stride(0),
                          .m = static_cast<int32_t>(m),
                          .n = static_cast<int32_t>(n),
                          .k = static_cast<int32_t>(k),
                          .rank = static_cast<int32_t>(rank),
                          .grads_are_float = is_float(a),
                          .scaling = static_cast<float>(scaling),
                          .dropout_threshold = dropout.threshold,
                          .dropout_scale = dropout.scale,
                          .seed = seed_of(seed),
                          .splits = config.grads.splits,
                          .split_rows = config.grads.split_rows,
                          .partials = floats_of(partials),
                          .counters = counters.data() + config.grad_x.counters,
                          .partial_grad_b = partial_grad_b,
                          .parts_of_grad_b = static_cast<int32_t>(config.parts_of_grad_b)};
  const cudaError_t error = with_element(x, [&](auto* e) {
    using Element = Pointee<decltype(e)>;
    const cudaError_t first = launch_lora_grad_x<Element>(p, config.grad_x, call.stream);
    return first != cudaSuccess ? first : launch_lora_grads<Element>(g, config.grads, call.stream);
  });
  counters.check(error, "lora_linear_backward");
  return result();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CUDA, m) {
  m.impl("lora_linear", TORCH_BOX(&lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward));
}

}  // namespace lk
