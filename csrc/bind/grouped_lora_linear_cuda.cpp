// grouped_lora_linear and its gradients on CUDA: tensors to a problem (grouped_lora_problem.h), its workspace, the
// launches. Nothing is asked of the device: sizes come from shapes.
#include <array>
#include <string>
#include <tuple>

#include "../launch/grouped_lora_linear.h"
#include "../launch/grouped_lora_problem.h"
#include "cuda_counters.h"
#include "grouped_checks.h"
#include "lora_rows.h"
#include "rows.h"
#include "vendor_products.h"

namespace lk {
namespace {

int64_t whole_rank(const Tensor& x, int64_t rank) {
  const int64_t elements = chunk_elements(static_cast<int>(x.element_size()));
  return blocks_of(rank, elements) * elements;
}

// The same with zeros behind a dimension, 1 or 2 of 3, or the last of 2.
Tensor padded(const Tensor& t, int64_t dim, int64_t size) {
  const int64_t more = size - t.size(dim);
  if (more == 0) return t;
  const std::array<int64_t, 4> pad =
      dim == t.dim() - 1 ? std::array<int64_t, 4>{0, more, 0, 0} : std::array<int64_t, 4>{0, 0, 0, more};
  return torch::stable::pad(t, {pad.data(), pad.size()});
}

Tensor narrowed(Tensor t, int64_t dim, int64_t size) {
  return t.size(dim) == size ? t : torch::stable::contiguous(torch::stable::narrow(t, dim, 0, size));
}

// Factors of the adapters [groups, ...] as the kernels read them: fp32 or x's type, and contiguous.
Tensor factors(const Tensor& t, const Tensor& x, int64_t rank_dim, bool turned) {
  const Tensor cast_ = is_fp32(t) ? t : cast(t, x.scalar_type());
  const Tensor whole = padded(cast_, rank_dim, whole_rank(x, t.size(rank_dim)));
  const Tensor rows = torch::stable::contiguous(turned ? torch::stable::transpose(whole, 1, 2) : whole);
  return reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % kChunkBytes == 0 ? rows : torch::stable::clone(rows);
}

// Whether the weights' rows lie in memory as columns, as gpt-oss stores its experts.
bool in_columns(const Tensor& w) {
  const int64_t dim = w.dim();
  return w.stride(dim - 1) != 1 && w.stride(dim - 2) == 1;
}

// The first group's of matrices [n, k], whose rows are neighbours, or columns where they lie so.
MatrixRef first_of(const Tensor& t, bool columns) {
  const int64_t dim = t.dim();
  return {t.const_data_ptr(), t.stride(dim - (columns ? 1 : 2)), t.size(dim - 2), t.size(dim - 1), float_type(t)};
}

// Bytes from one group's to the next one's; 0: it is shared by all, and has no dimension of groups.
int64_t step_of(const Tensor& t, int64_t shared_dim) {
  return t.dim() == shared_dim ? 0 : t.stride(0) * static_cast<int64_t>(t.element_size());
}

void check_served(const Tensor& x, const Tensor& w) {
  check_type(x, "grouped_lora_linear");
  const int64_t dim = w.dim(), elements = chunk_elements(static_cast<int>(x.element_size()));
  const MatrixRef first = first_of(w, in_columns(w));
  STD_TORCH_CHECK(
      w.size(dim - 2) % elements == 0 && w.size(dim - 1) % elements == 0 &&
          (w.stride(dim - 1) == 1 || w.stride(dim - 2) == 1) && first.aligned() && first.stride <= kMaxRowStride &&
          step_of(w, 2) % kChunkBytes == 0,
      "grouped_lora_linear: the CUDA kernels serve weights whose rows, or columns, are neighbours in memory, "
      "consist of chunks of 16 bytes and begin at one");
}

// Who makes the product of m rows with the weights, for results of so many columns.
UsesCublas vendor_of(const Tensor& x, const Tensor& weight, const Tensor& offsets, int64_t columns,
                     const DeviceLimits& device, const std::string& schedule) {
  const GroupedProduct product{.is_shared = weight.dim() == 2,
                               .has_vendor = float_type(x) == FloatType::kBFloat16 && has_grouped_product()};
  return grouped_uses_vendor(x.size(0), columns, offsets.size(0), product, device, wanted(schedule));
}

// Rows times the weights, or their transposes: in `out`, if these are one for all, else in what the vendor allocates.
Tensor vendor_product(const Tensor& out, const Tensor& rows, const Tensor& weight, const Tensor& ends) {
  if (weight.dim() == 3) return grouped_product(rows, weight, ends);
  product(out, rows, weight);
  return out;
}

// The operands of a call as the kernels read them. What had to be copied lives as long as this.
struct Operands {
  const bool columns;
  const Tensor x, w, a, b;
  const std::optional<Tensor> bias;
  const GroupedLoraProblem problem;

  // turned: the factor whose rows are of the rank's length lies in columns as the weights do. In the forward that is b,
  // in the gradient of x it is a.
  Operands(const Tensor& x_, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, const Tensor& offsets,
           const std::optional<Tensor>& bias_, const std::optional<Tensor>& seed, double scaling, double dropout_p,
           bool is_backward, bool onto_y)
      : columns(!onto_y && in_columns(weight)),
        x(whole_rows(x_)),
        w(weight),
        a(factors(lora_A, x_, 1, columns && is_backward)),
        b(factors(lora_B, x_, 2, columns && !is_backward)),
        bias(contiguous(bias_)),
        problem{.first = {.x = first_of(x, false),
                          .w = first_of(w, columns),
                          .a = {a.const_data_ptr(), a.size(2), whole_rank(x_, lora_A.size(1)), lora_A.size(2),
                                float_type(a)},
                          .b = {b.const_data_ptr(), b.size(2), lora_B.size(1), whole_rank(x_, lora_B.size(2)),
                                float_type(b)},
                          .bias = bias ? bias->const_data_ptr() : nullptr,
                          .scaling = static_cast<float>(scaling),
                          .seed = seed ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr,
                          .dropout_p = dropout_p,
                          .w_in_columns = columns},
                .ends = static_cast<const int32_t*>(offsets.const_data_ptr()),
                .groups = offsets.size(0),
                .w_step = step_of(w, 2),
                .a_step = step_of(a, 2),
                .b_step = step_of(b, 2),
                .bias_step = bias ? step_of(*bias, 1) : 0,
                .onto_y = onto_y} {}
};

std::tuple<Tensor, Tensor> grouped_lora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor offsets,
                                               std::optional<Tensor> bias, std::optional<Tensor> seed, double scaling,
                                               double dropout_p, std::string schedule) {
  check_grouped_lora_linear(x, weight, lora_A, lora_B, offsets, bias, seed);
  check_served(x, weight);
  const CudaCall call(x);
  const Tensor ends = torch::stable::contiguous(offsets);
  const DeviceLimits device = device_limits(call.device);
  const bool onto_y = x.size(0) > 0 && vendor_of(x, weight, ends, weight.size(weight.dim() - 2), device, schedule).yes;
  const Operands operands(x, weight, lora_A, lora_B, ends, bias, seed, scaling, dropout_p, false, onto_y);
  const GroupedLoraProblem& problem = operands.problem;
  const int64_t m = problem.first.m(), n = problem.first.n();
  const Tensor s = new_empty_as(x, {m, problem.first.rank()});
  Tensor y = new_empty_as(x, {onto_y && weight.dim() == 3 ? 0 : m, n});
  if (m > 0) {
    if (onto_y) y = vendor_product(y, operands.x, torch::stable::transpose(weight, -2, -1), ends);
    const GroupedLoraConfig config = grouped_forward_config(problem, device);
    const Counters counters(x, call, config.launch.counters);
    const GroupedLoraLinearParams p =
        grouped_forward_params(problem, {y.mutable_data_ptr(), n}, s.mutable_data_ptr(), config, counters.data());
    const cudaError_t error = with_element(problem.first.x.type, [&]<class Element>(std::type_identity<Element>) {
      return launch_grouped_lora<Element>(p, config, call.stream);
    });
    check_cuda(error, "grouped_lora_linear");
  }
  return {y, narrowed(s, 1, lora_A.size(1))};
}

std::tuple<Tensor, Tensor, Tensor> grouped_lora_linear_backward(Tensor grad_y, Tensor x, Tensor s, Tensor weight,
                                                                Tensor lora_A, Tensor lora_B, Tensor offsets,
                                                                std::optional<Tensor> seed, double scaling,
                                                                double dropout_p, bool need_x, bool need_A, bool need_B,
                                                                std::string schedule) {
  check_grouped_lora_linear_backward(grad_y, x, s, weight, lora_A, lora_B, offsets, seed);
  check_served(x, weight);
  const CudaCall call(x);
  const Tensor ends = torch::stable::contiguous(offsets);
  const DeviceLimits device = device_limits(call.device);
  const bool onto_y =
      need_x && x.size(0) > 0 && vendor_of(x, weight, ends, weight.size(weight.dim() - 1), device, schedule).yes;
  const Operands operands(x, weight, lora_A, lora_B, ends, std::nullopt, seed, scaling, dropout_p, true, onto_y);
  const GroupedLoraProblem& groups = operands.problem;
  const Tensor gy = whole_rows(grad_y), saved_s = whole_rows(padded(s, 1, groups.first.rank()));
  const LoraBackwardProblem problem{.forward = groups.first,
                                    .grad_y = first_of(gy, false),
                                    .s = first_of(saved_s, false),
                                    .need_x = need_x,
                                    .need_a = need_A,
                                    .need_b = need_B};
  const int64_t m = groups.first.m(), k = groups.first.k(), n = groups.first.n(), rank = groups.first.rank();
  const ScalarType grad_type = is_fp32(lora_A) ? ScalarType::Float : x.scalar_type();
  const auto gradient = [&](bool need, std::initializer_list<int64_t> sizes, ScalarType type) {
    return need ? new_empty_as(x, sizes, type) : new_empty_as(x, {0}, type);
  };
  Tensor grad_x = gradient(need_x, {onto_y && weight.dim() == 3 ? 0 : m, k}, x.scalar_type());
  const Tensor grad_a = gradient(need_A, {groups.groups, rank, k}, grad_type);
  const Tensor grad_b = gradient(need_B, {groups.groups, n, rank}, grad_type);
  const auto result = [&](const Tensor& gradient, const Tensor& of, int64_t rank_dim, bool need) {
    return need ? cast(narrowed(gradient, rank_dim, of.size(rank_dim)), of.scalar_type())
                : cast(gradient, of.scalar_type());
  };

  if (onto_y) grad_x = vendor_product(grad_x, gy, weight, ends);
  const GroupedLoraBackwardConfig config = grouped_backward_config(problem, groups, device);
  const Counters counters(x, call, config.grad_x.launch.counters + config.grads.counters);
  const Tensor grad_s = new_empty_as(x, {m, rank}),
               partials = new_empty_as(x, {config.grads.partials}, ScalarType::Float);
  const LoraBackwardWorkspace workspace{.counters = counters.data(),
                                        .grad_s = grad_s.mutable_data_ptr(),
                                        .partial_grad_b = nullptr,
                                        .partials = static_cast<float*>(partials.mutable_data_ptr())};
  const GroupedLoraLinearParams p =
      grouped_grad_x_params(problem, groups, {grad_x.mutable_data_ptr(), k}, config, workspace);
  const GroupedLoraGradsParams g =
      grouped_grads_params(problem, groups, need_A ? grad_a.mutable_data_ptr() : nullptr,
                           need_B ? grad_b.mutable_data_ptr() : nullptr, config, workspace);
  const cudaError_t error = with_element(problem.forward.x.type, [&]<class Element>(std::type_identity<Element>) {
    if (m > 0 && config.grad_x.launch.blocks > 0) {
      const cudaError_t error = launch_grouped_lora<Element>(p, config.grad_x, call.stream);
      if (error != cudaSuccess) return error;
    }
    return config.grads.blocks > 0 ? launch_grouped_lora_grads<Element>(g, config.grads, call.stream) : cudaSuccess;
  });
  check_cuda(error, "grouped_lora_linear_backward");
  return {grad_x, result(grad_a, lora_A, 1, need_A), result(grad_b, lora_B, 2, need_B)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CUDA, m) {
  m.impl("grouped_lora_linear", TORCH_BOX(&grouped_lora_linear));
  m.impl("grouped_lora_linear_backward", TORCH_BOX(&grouped_lora_linear_backward));
}

}  // namespace lk
