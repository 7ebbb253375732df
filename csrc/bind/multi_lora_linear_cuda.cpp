// multi_lora_linear, the halves of its branch, and its gradients on CUDA: tensors to a problem (multi_lora_problem.h),
// its workspace, the launches. Nothing is asked of the device: who has which adapter, and of which rank, is read by the
// kernels.
#include <string>
#include <tuple>

#include "../launch/multi_lora_linear.h"
#include "../launch/multi_lora_problem.h"
#include "cuda_counters.h"
#include "lora_rows.h"
#include "multi_checks.h"
#include "rows.h"
#include "vendor_products.h"

namespace lk {
namespace {

// Pools as the kernels read them: fp32 or x's type, their rows neighbours in memory. Those of lora_A begin at chunks.
Tensor pool_rows(const Tensor& pool, const Tensor& x, bool at_chunks) {
  const Tensor rows = with_contiguous_rows(is_fp32(pool) ? pool : cast(pool, x.scalar_type()));
  const bool are_near = rows.stride(1) <= kMaxRowStride;
  if (are_near && (!at_chunks || rows_aligned(rows))) return rows;
  const Tensor copy = torch::stable::contiguous(rows);
  return !at_chunks || rows_aligned(copy) ? copy : torch::stable::clone(copy);
}

// The first one's of a pool.
MatrixRef first_of(const Tensor& pool) {
  return {pool.const_data_ptr(), pool.stride(1), pool.size(1), pool.size(2), float_type(pool)};
}

int64_t step_of(const Tensor& pool) { return pool.stride(0) * static_cast<int64_t>(pool.element_size()); }

Integers integers_of(const std::optional<Tensor>& t) {
  if (!t) return {nullptr, 0, false};
  return {t->const_data_ptr(), t->stride(0), t->scalar_type() == ScalarType::Long};
}

AdapterPools pools_of(const std::optional<Tensor>& ranks, const std::optional<Tensor>& scalings, int64_t a_step,
                      int64_t b_step, int64_t count) {
  return {.ranks = integers_of(ranks),
          .scalings = scalings ? static_cast<const float*>(scalings->const_data_ptr()) : nullptr,
          .scalings_step = scalings ? scalings->stride(0) : 0,
          .a_step = a_step,
          .b_step = b_step,
          .count = static_cast<int32_t>(count),
          .ranks_are_whole = false};
}

void check_served(const Tensor& x, const Tensor& w) {
  check_type(x, "multi_lora_linear");
  const int64_t elements = chunk_elements(static_cast<int>(x.element_size()));
  STD_TORCH_CHECK(w.size(0) % elements == 0 && w.size(1) % elements == 0,
                  "multi_lora_linear: the CUDA kernels serve weights whose rows and columns are chunks of 16 bytes");
}

void check_chunks(const Tensor& rows, const char* op, const char* name) {
  check_type(rows, op);
  STD_TORCH_CHECK(rows.size(rows.dim() - 1) % chunk_elements(static_cast<int>(rows.element_size())) == 0, op,
                  ": the CUDA kernels serve rows of chunks of 16 bytes, which ", name, " has not");
}

void check_order(const Tensor& like, const Tensor& rows, const Tensor& ends, int64_t m, int64_t adapters) {
  const auto fits = [](const Tensor& t, int64_t size) {
    return t.dim() == 1 && t.size(0) == size && t.scalar_type() == ScalarType::Int && (size < 2 || t.stride(0) == 1);
  };
  STD_TORCH_CHECK(fits(rows, m), "order must be int32 [rows], contiguous");
  STD_TORCH_CHECK(fits(ends, adapters), "ends must be int32 [adapters], contiguous");
  STD_TORCH_CHECK(is_beside(like, rows) && is_beside(like, ends), "order and ends must be on the operands' device");
}

// The operands of a call as the kernels read them. What had to be copied lives as long as this.
struct Operands {
  const Tensor x, w, a, b;
  const std::optional<Tensor> bias, scalings;
  const MultiLoraProblem problem;

  Operands(const Tensor& x_, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, const Tensor& ids,
           const std::optional<Tensor>& ranks, const std::optional<Tensor>& scalings_,
           const std::optional<Tensor>& bias_, const std::optional<Tensor>& seed, double scaling, double dropout_p)
      : x(whole_rows(x_)),
        w(weight),
        a(pool_rows(lora_A, x_, true)),
        b(pool_rows(lora_B, x_, false)),
        bias(contiguous(bias_)),
        scalings(scalings_ ? std::optional(cast(*scalings_, ScalarType::Float)) : std::nullopt),
        problem{.first = {.x = ref_of(x),
                          .w = ref_of(w),
                          .a = first_of(a),
                          .b = first_of(b),
                          .bias = bias ? bias->const_data_ptr() : nullptr,
                          .scaling = static_cast<float>(scaling),
                          .seed = seed ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr,
                          .dropout_p = dropout_p,
                          .w_in_columns = w.stride(1) != 1},
                .pools = pools_of(ranks, scalings, step_of(a), step_of(b), a.size(0)),
                .ids = integers_of(ids)} {}
};

// The rows of each adapter, on the device.
class Order {
 public:
  Order(const Tensor& like, const MultiLoraProblem& problem)
      : memory_(new_empty_as(like, {problem.first.m() + problem.adapters()}, ScalarType::Int)),
        order{.rows = static_cast<int32_t*>(memory_.mutable_data_ptr()), .ends = order.rows + problem.first.m()} {}

 private:
  const Tensor memory_;

 public:
  const RowOrder order;
};

// [m, rank] of x's type, all zeros: no launch writes what no adapter has.
Tensor zeros_of_s(const Tensor& x, const CudaCall& call, const MultiLoraProblem& problem) {
  const Tensor s = new_empty_as(x, {problem.first.m(), problem.first.rank()});
  const size_t bytes = s.numel() * s.element_size();
  if (bytes > 0) check_cuda(cudaMemsetAsync(s.mutable_data_ptr(), 0, bytes, call.stream), "cudaMemsetAsync");
  return s;
}

Tensor floats(const Tensor& like, int64_t count) { return new_empty_as(like, {count}, ScalarType::Float); }

std::tuple<Tensor, Tensor> multi_lora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor adapter_ids,
                                             std::optional<Tensor> ranks, std::optional<Tensor> scalings,
                                             std::optional<Tensor> bias, std::optional<Tensor> seed, double scaling,
                                             double dropout_p, std::string schedule) {
  check_multi_lora_linear(x, weight, lora_A, lora_B, adapter_ids, ranks, scalings, bias, seed);
  check_served(x, weight);
  const CudaCall call(x);
  const Operands operands(x, weight, lora_A, lora_B, adapter_ids, ranks, scalings, bias, seed, scaling, dropout_p);
  const MultiLoraProblem& problem = operands.problem;
  const int64_t m = problem.first.m(), n = problem.first.n();
  const MultiLoraForwardConfig config = multi_forward_config(problem, device_limits(call.device), wanted(schedule));
  const Tensor y = new_empty_as(x, {m, n});
  const Tensor s = config.decodes ? new_empty_as(x, {m, problem.first.rank()}) : zeros_of_s(operands.x, call, problem);
  const OutputRef out{y.mutable_data_ptr(), n};
  const auto result = [&] { return std::make_tuple(with_leading_sizes_of(y, x), with_leading_sizes_of(s, x)); };
  if (m == 0) return result();

  const LoraLinearConfig& first = config.decodes ? config.decode : config.shrink.launch;
  const Counters counters(x, call, first.counters);
  const Tensor partials = floats(x, first.partials);
  const LoraWorkspace workspace{counters.data(), static_cast<float*>(partials.mutable_data_ptr())};
  if (config.decodes) {
    const MultiLoraDecodeParams p = multi_decode_params(problem, out, s.mutable_data_ptr(), config.decode, workspace);
    check_cuda(with_element(problem.first.x.type,
                            [&]<class Element>(std::type_identity<Element>) {
                              return launch_multi_lora_decode<Element>(p, config.decode, call.stream);
                            }),
               "multi_lora_linear");
    return result();
  }
  product(y, operands.x, transposed(operands.w), operands.bias, 0);
  const Order rows(x, problem);
  check_cuda(launch_multi_lora_order(multi_order_params(problem, rows.order), call.stream), "multi_lora_linear");
  const cudaError_t error = with_element(problem.first.x.type, [&]<class Element>(std::type_identity<Element>) {
    for (const MultiLoraConfig* which : {&config.shrink, &config.expand}) {
      const MultiLoraBranchParams p =
          multi_forward_params(problem, out, s.mutable_data_ptr(), *which, workspace, rows.order);
      const cudaError_t error = launch_multi_lora_branch<Element>(p, which->launch, call.stream);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  });
  check_cuda(error, "multi_lora_linear");
  return result();
}

// ------------------------------------------------------------------------------ one half of the branch by itself

// A matrix that a half does not read.
MatrixRef unread(int64_t rows, int64_t columns, FloatType type) { return {nullptr, 0, rows, columns, type}; }

// The rows of each adapter, as the caller knows them or as they are looked up.
class KnownOrder {
 public:
  KnownOrder(const std::optional<Tensor>& rows, const std::optional<Tensor>& ends, const Tensor& like,
             const MultiLoraProblem& problem, const CudaCall& call) {
    if (rows && ends) {
      check_order(like, *rows, *ends, problem.first.m(), problem.adapters());
      order = {static_cast<int32_t*>(rows->mutable_data_ptr()), static_cast<int32_t*>(ends->mutable_data_ptr())};
      return;
    }
    looked_up_.emplace(like, problem);
    order = looked_up_->order;
    check_cuda(launch_multi_lora_order(multi_order_params(problem, order), call.stream), "multi_lora_branch");
  }

 private:
  std::optional<Order> looked_up_;

 public:
  RowOrder order;
};

void launch_half(const MultiLoraProblem& problem, OutputRef y, void* s, const MultiLoraConfig& config,
                 const LoraWorkspace& workspace, const KnownOrder& known, const CudaCall& call) {
  const MultiLoraBranchParams p = multi_forward_params(problem, y, s, config, workspace, known.order);
  check_cuda(with_element(problem.first.x.type,
                          [&]<class Element>(std::type_identity<Element>) {
                            return launch_multi_lora_branch<Element>(p, config.launch, call.stream);
                          }),
             "multi_lora_branch");
}

Tensor multi_lora_shrink(Tensor x, Tensor lora_A, Tensor adapter_ids, std::optional<Tensor> ranks,
                         std::optional<Tensor> order, std::optional<Tensor> ends, std::string) {
  check_multi_lora_shrink(x, lora_A, adapter_ids, ranks);
  check_chunks(x, "multi_lora_shrink", "x");
  const CudaCall call(x);
  const Tensor rows = whole_rows(x), a = pool_rows(lora_A, x, true);
  const FloatType type = float_type(x);
  const int64_t k = rows.size(1), rank = a.size(1);
  const MultiLoraProblem problem{
      .first = {.x = ref_of(rows), .w = unread(0, k, type), .a = first_of(a), .b = unread(0, rank, float_type(a))},
      .pools = pools_of(ranks, std::nullopt, step_of(a), 0, a.size(0)),
      .ids = integers_of(adapter_ids)};
  const Tensor s = zeros_of_s(rows, call, problem);
  if (problem.first.m() > 0) {
    const MultiLoraConfig config =
        multi_lora_shrink_config(LoraRole::kForward, problem.first.m(), k, rank, problem.adapters(),
                                 problem.first.element_bytes(), device_limits(call.device));
    const Counters counters(x, call, config.launch.counters);
    const Tensor partials = floats(x, config.launch.partials);
    const KnownOrder known(order, ends, x, problem, call);
    launch_half(problem, {nullptr, 0}, s.mutable_data_ptr(), config,
                {counters.data(), static_cast<float*>(partials.mutable_data_ptr())}, known, call);
  }
  return with_leading_sizes_of(s, x);
}

void multi_lora_expand_(Tensor y, Tensor s, Tensor lora_B, Tensor adapter_ids, std::optional<Tensor> ranks,
                        std::optional<Tensor> scalings, double scaling, std::optional<Tensor> order,
                        std::optional<Tensor> ends, std::string) {
  check_multi_lora_expand(y, s, lora_B, adapter_ids, ranks, scalings);
  check_chunks(y, "multi_lora_expand_", "y");
  const CudaCall call(y);
  if (y.numel() == 0) return;
  const Tensor rows = as_rows(y);
  STD_TORCH_CHECK(rows.const_data_ptr() == y.const_data_ptr() && rows_aligned(rows),
                  "multi_lora_expand_: y must be a matrix in memory, whose rows begin at 16 bytes");
  const Tensor b = pool_rows(lora_B, y, false), contiguous_s = torch::stable::contiguous(as_rows(s));
  const Tensor inner = rows_aligned(contiguous_s) ? contiguous_s : torch::stable::clone(contiguous_s);
  const std::optional<Tensor> factors = scalings ? std::optional(cast(*scalings, ScalarType::Float)) : std::nullopt;
  const FloatType type = float_type(y);
  const int64_t m = rows.size(0), n = rows.size(1), rank = b.size(2);
  const MultiLoraProblem problem{.first = {.x = unread(m, 0, type),
                                           .w = unread(n, 0, type),
                                           .a = unread(rank, 0, float_type(b)),
                                           .b = first_of(b),
                                           .scaling = static_cast<float>(scaling)},
                                 .pools = pools_of(ranks, factors, 0, step_of(b), b.size(0)),
                                 .ids = integers_of(adapter_ids)};
  const MultiLoraConfig config = multi_lora_expand_config(LoraRole::kForward, m, n, problem.adapters());
  const KnownOrder known(order, ends, y, problem, call);
  launch_half(problem, {rows.mutable_data_ptr(), rows.stride(0)}, inner.mutable_data_ptr(), config, {nullptr, nullptr},
              known, call);
}

// ------------------------------------------------------------------------------------------------------ gradients

std::tuple<Tensor, Tensor, Tensor> multi_lora_linear_backward(
    Tensor grad_y, Tensor x, Tensor s, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor adapter_ids,
    std::optional<Tensor> ranks, std::optional<Tensor> scalings, std::optional<Tensor> seed, double scaling,
    double dropout_p, bool need_x, bool need_A, bool need_B, std::string) {
  check_multi_lora_linear(x, weight, lora_A, lora_B, adapter_ids, ranks, scalings, std::nullopt, seed);
  check_gradient(grad_y, x, s, weight.size(0), lora_A.size(1));
  check_served(x, weight);
  const CudaCall call(x);
  const Operands operands(x, weight, lora_A, lora_B, adapter_ids, ranks, scalings, std::nullopt, seed, scaling,
                          dropout_p);
  const MultiLoraProblem& multi = operands.problem;
  const Tensor gy = whole_rows(grad_y), saved_s = torch::stable::contiguous(as_rows(s));
  const LoraBackwardProblem problem{.forward = multi.first,
                                    .grad_y = ref_of(gy),
                                    .s = ref_of(saved_s),
                                    .need_x = need_x,
                                    .need_a = need_A,
                                    .need_b = need_B};
  const int64_t m = multi.first.m(), k = multi.first.k(), n = multi.first.n(), rank = multi.first.rank();
  const ScalarType grad_type = is_fp32(lora_A) ? ScalarType::Float : x.scalar_type();
  const auto gradient = [&](bool need, std::initializer_list<int64_t> sizes, ScalarType type) {
    return need ? new_empty_as(x, sizes, type) : new_empty_as(x, {0}, type);
  };
  const Tensor grad_x = gradient(need_x, {m, k}, x.scalar_type());
  const Tensor grad_a = gradient(need_A, {multi.adapters(), rank, k}, grad_type);
  const Tensor grad_b = gradient(need_B, {multi.adapters(), n, rank}, grad_type);
  if (need_x && m > 0) product(grad_x, gy, operands.w);

  const MultiLoraBackwardConfig config = multi_backward_config(problem, multi, device_limits(call.device));
  const Counters counters(x, call, config.shrink.launch.counters + config.grads.counters);
  const Tensor partials = floats(x, config.shrink.launch.partials + config.grads.partials);
  const Tensor grad_s = zeros_of_s(operands.x, call, multi);
  const LoraBackwardWorkspace workspace{.counters = counters.data(),
                                        .grad_s = grad_s.mutable_data_ptr(),
                                        .partial_grad_b = nullptr,
                                        .partials = static_cast<float*>(partials.mutable_data_ptr())};
  const Order rows(x, multi);
  check_cuda(launch_multi_lora_order(multi_order_params(multi, rows.order), call.stream), "multi_lora_linear_backward");
  const MultiLoraGradsParams g =
      multi_grads_params(problem, multi, need_A ? grad_a.mutable_data_ptr() : nullptr,
                         need_B ? grad_b.mutable_data_ptr() : nullptr, config, workspace, rows.order);
  const cudaError_t error = with_element(multi.first.x.type, [&]<class Element>(std::type_identity<Element>) {
    for (const MultiLoraConfig* which : {&config.shrink, &config.expand}) {
      if (which->launch.blocks == 0) continue;
      const MultiLoraBranchParams p =
          multi_grad_x_params(problem, multi, {grad_x.mutable_data_ptr(), k}, *which, workspace, rows.order);
      const cudaError_t error = launch_multi_lora_branch<Element>(p, which->launch, call.stream);
      if (error != cudaSuccess) return error;
    }
    return config.grads.blocks > 0 ? launch_multi_lora_grads<Element>(g, config.grads, call.stream) : cudaSuccess;
  });
  check_cuda(error, "multi_lora_linear_backward");
  return {need_x ? with_leading_sizes_of(grad_x, x) : grad_x, cast(grad_a, lora_A.scalar_type()),
          cast(grad_b, lora_B.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CUDA, m) {
  m.impl("multi_lora_linear", TORCH_BOX(&multi_lora_linear));
  m.impl("multi_lora_shrink", TORCH_BOX(&multi_lora_shrink));
  m.impl("multi_lora_expand_", TORCH_BOX(&multi_lora_expand_));
  m.impl("multi_lora_linear_backward", TORCH_BOX(&multi_lora_linear_backward));
}

}  // namespace lk
