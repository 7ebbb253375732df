// A call of lora_linear or of its gradients on CUDA: tensors to a problem (lora_problem.h), its workspace, the
// launches. What multiplies by the weight, where that is the vendor's GEMM, is the caller's: a weight need not be in
// memory then.
#pragma once

#include <tuple>

#include "../launch/lora_linear.h"
#include "../launch/lora_linear_wgmma.h"
#include "../launch/lora_problem.h"
#include "aten.h"
#include "cuda_counters.h"
#include "lora_checks.h"
#include "lora_rows.h"
#include "rows.h"
#include "vendor_products.h"

namespace lk {

inline OutputRef output_of(const Tensor& t, int64_t stride) { return {t.mutable_data_ptr(), stride}; }

// Whether w is the transpose of a matrix in rows, as transformers' Conv1D holds it. BLAS counts strides in 32 bits.
inline bool in_columns(const Tensor& w) {
  return w.stride(1) != 1 && w.stride(0) == 1 && w.stride(1) >= w.size(0) && w.stride(1) <= INT32_MAX;
}

// The operands of a call as the kernels read them. What had to be copied lives as long as this.
struct Operands {
  const Tensor x, a, b;
  const std::optional<Tensor> bias;
  const LoraProblem problem;

  Operands(const Tensor& x_, const MatrixRef& w, bool w_in_columns, const Tensor& lora_A, const Tensor& lora_B,
           const std::optional<Tensor>& bias_, const std::optional<Tensor>& seed, double scaling, double dropout_p)
      : x(matrix_of(x_)),
        a(adapter_rows(lora_A, x_)),
        b(adapter_rows(lora_B, x_)),
        bias(contiguous(bias_)),
        problem{.x = ref_of(x),
                .w = w,
                .a = ref_of(a),
                .b = ref_of(b),
                .bias = bias ? bias->const_data_ptr() : nullptr,
                .scaling = static_cast<float>(scaling),
                .seed = seed ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr,
                .dropout_p = dropout_p,
                .w_in_columns = w_in_columns} {}
};

// Workspace of a launch that may need none.
class Floats {
 public:
  Floats(const Tensor& like, int64_t count) {
    if (count > 0) memory_ = new_empty_as(like, {count}, ScalarType::Float);
  }
  float* data() const { return memory_ ? static_cast<float*>(memory_->mutable_data_ptr()) : nullptr; }

 private:
  std::optional<Tensor> memory_;
};

// One launch, of the forward or of dX.
template <class Element>
cudaError_t launch_lora(const LoraLinearParams& p, const LoraLinearConfig& config, cudaStream_t stream) {
  if constexpr (kHasWgmma<Element>) {
    if (config.key.schedule == Schedule::kWgmma) return launch_lora_linear_wgmma<Element>(p, config, stream);
  }
  if (config.key.role == LoraRole::kGradX) return launch_lora_grad_x<Element>(p, config, stream);
  return launch_lora_linear<Element>(p, config, stream);
}

inline DeviceLimits limits_of(const CudaCall& call) {
  DeviceLimits device = device_limits(call.device);
  device.encodes_tensor_maps = encodes_tensor_maps();
  return device;
}

// y and s. add_product(y): y += x wT, where the config leaves that to the vendor's GEMM.
template <class AddProduct>
std::tuple<Tensor, Tensor> lora_forward(const Tensor& x, const Operands& operands, const CudaCall& call, Wanted wanted,
                                        const AddProduct& add_product) {
  const LoraProblem& problem = operands.problem;
  const int64_t m = problem.m(), n = problem.n();
  const Tensor y = new_empty_as(x, {m, n}), s = new_empty_as(x, {m, problem.rank()});
  const LoraForwardConfig config = lora_forward_config(problem, limits_of(call), wanted);
  if (m > 0) {
    // The vendor's GEMM takes factors of one type. Rounding those of fp32 is a launch of its own, which is little
    // beside the product: it reads `rank` rows, not those of x.
    if (config.vendor_makes_s) product(s, operands.x, transposed(cast(operands.a, x.scalar_type())));
    const Counters counters(x, call, config.launch.counters);
    const Floats partials(x, config.launch.partials);
    const LoraWorkspace workspace{.counters = counters.data(), .partials = partials.data()};
    const cudaError_t error = with_element(problem.x.type, [&]<class Element>(std::type_identity<Element>) {
      for (const LoraLinearConfig* which : {&config.launch, &config.expand}) {
        const LoraLinearParams p = forward_params(problem, output_of(y, n), s.mutable_data_ptr(), *which, workspace);
        const cudaError_t error = launch_lora<Element>(p, *which, call.stream);
        if (error != cudaSuccess) return error;
      }
      return cudaSuccess;
    });
    check_cuda(error, "lora_linear");
    if (config.cublas.yes) add_product(y);
  }
  return {with_leading_sizes_of(y, x), with_leading_sizes_of(s, x)};
}

// dX, dA and dB. add_product(dX): dX += dY w, likewise.
template <class AddProduct>
std::tuple<Tensor, Tensor, Tensor> lora_backward(const Tensor& x, const Tensor& lora_A, const Tensor& gy,
                                                 const Tensor& s, const Operands& operands, bool need_x, bool need_A,
                                                 bool need_B, const CudaCall& call, Wanted wanted,
                                                 const AddProduct& add_product) {
  const Tensor saved_s = torch::stable::contiguous(as_rows(s));
  const LoraBackwardProblem problem{.forward = operands.problem,
                                    .grad_y = ref_of(gy),
                                    .s = ref_of(saved_s),
                                    .need_x = need_x,
                                    .need_a = need_A,
                                    .need_b = need_B};
  const int64_t m = problem.forward.m(), k = problem.forward.k(), n = problem.forward.n(),
                rank = problem.forward.rank();
  const ScalarType grad_type = is_fp32(lora_A) ? ScalarType::Float : x.scalar_type();
  const auto gradient = [&](bool need, int64_t size0, int64_t size1, ScalarType type) {
    return need ? new_empty_as(x, {size0, size1}, type) : new_empty_as(x, {0}, type);
  };
  const Tensor grad_x = gradient(need_x, m, k, x.scalar_type());
  const Tensor grad_a = gradient(need_A, rank, k, grad_type), grad_b = gradient(need_B, n, rank, grad_type);
  const auto result = [&] {
    return std::make_tuple(need_x ? with_leading_sizes_of(grad_x, x) : grad_x, cast(grad_a, lora_A.scalar_type()),
                           cast(grad_b, lora_A.scalar_type()));
  };
  if (m == 0) {
    for (const Tensor* t : {&grad_a, &grad_b}) {
      const size_t bytes = t->numel() * t->element_size();
      if (bytes > 0) check_cuda(cudaMemsetAsync(t->mutable_data_ptr(), 0, bytes, call.stream), "cudaMemsetAsync");
    }
    return result();
  }

  const LoraBackwardConfig config = lora_backward_config(problem, limits_of(call), wanted);
  const Counters counters(x, call, config.grad_x.counters + config.grads.counters);
  const Tensor grad_s = new_empty_as(x, {m, rank});
  if (config.vendor_makes_s) product(grad_s, gy, cast(operands.b, x.scalar_type()));  // as in the forward
  const Floats parts_of_grad_b(x, config.partial_grad_b), partials(x, config.grad_x.partials + config.grads.partials);
  const LoraBackwardWorkspace workspace{.counters = counters.data(),
                                        .grad_s = grad_s.mutable_data_ptr(),
                                        .partial_grad_b = parts_of_grad_b.data(),
                                        .partials = partials.data()};
  const LoraGradsParams g = grads_params(problem, need_A ? grad_a.mutable_data_ptr() : nullptr,
                                         need_B ? grad_b.mutable_data_ptr() : nullptr, config, workspace);
  const cudaError_t error = with_element(problem.forward.x.type, [&]<class Element>(std::type_identity<Element>) {
    for (const LoraLinearConfig* which : {&config.grad_x, &config.expand}) {
      const LoraLinearParams p = grad_x_params(problem, output_of(grad_x, k), *which, config, workspace);
      const cudaError_t error = launch_lora<Element>(p, *which, call.stream);
      if (error != cudaSuccess) return error;
    }
    return launch_lora_grads<Element>(g, config.grads, call.stream);
  });
  check_cuda(error, "lora_linear_backward");
  if (need_x && config.cublas.yes) add_product(grad_x);
  return result();
}

}  // namespace lk
