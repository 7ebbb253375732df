// lora_pack and its gradients on CUDA, where one launch is of all members: tensors to a problem (lora_pack_problem.h),
// its workspace, the launches.
#include <string>
#include <tuple>

#include "../launch/lora_pack.h"
#include "../launch/lora_pack_problem.h"
#include "lora_call.h"
#include "pack_checks.h"

namespace lk {
namespace {

// What a pack is called with, as the kernels read it. What had to be copied lives as long as this.
class PackOperands {
 public:
  PackOperands(const Tensor& x, const Tensors& weights, const Tensors& lora_As, const Tensors& lora_Bs,
               const Tensors& biases, const std::optional<Tensor>& seed, const std::vector<double>& scalings,
               const std::vector<double>& dropout_p)
      : x_(whole_rows(x)) {
    for (size_t i = 0; i < weights.size(); ++i) {
      std::optional<Tensor> bias;
      if (i < biases.size() && biases[i].numel() != 0) bias = biases[i];
      const Tensor& w = weights[i];
      members_.emplace_back(x_, ref_of(w), w.stride(1) != 1, lora_As[i], lora_Bs[i], bias, seed, scalings[i],
                            dropout_p[i]);
      problem.push_back(members_.back().problem);
      problem.back().seed_step = member_seed(0, i);
      if (problem.back().rank() == 0) problem.back().b.stride = 0;  // of no elements, its rows are where chunks begin
    }
    STD_TORCH_CHECK(float_type(x) != FloatType::kFloat64 && is_served(problem),
                    "lora_pack: the CUDA kernels serve bfloat16, float16 and, in tf32, float32, a few members, and "
                    "weights and adapters whose rows consist of chunks of 16 bytes");
  }

  LoraPackProblem problem;

 private:
  Tensor x_;
  std::vector<Operands> members_;
};

// Each member's part of the op's s, or of s', which lie one behind the other.
std::vector<void*> parts_of(const Tensor& s, const LoraPackProblem& problem) {
  std::vector<void*> parts;
  char* next = static_cast<char*>(s.mutable_data_ptr());
  for (const LoraProblem& member : problem) {
    parts.push_back(next);
    next += member.m() * member.rank() * member.element_bytes();
  }
  return parts;
}

std::tuple<Tensors, Tensor> lora_pack(Tensor x, Tensors weights, Tensors lora_As, Tensors lora_Bs, Tensors biases,
                                      std::optional<Tensor> seed, std::vector<double> scalings,
                                      std::vector<double> dropout_p, std::string) {
  check_lora_pack(x, weights, lora_As, lora_Bs, biases, seed, scalings, dropout_p);
  const CudaCall call(x);
  const PackOperands operands(x, weights, lora_As, lora_Bs, biases, seed, scalings, dropout_p);
  const LoraPackProblem& problem = operands.problem;
  const int64_t m = problem[0].m();
  const Tensor s = new_empty_as(x, {m * total_rank(lora_As)});
  Tensors ys;
  std::vector<void*> y_data;
  for (const Tensor& weight : weights) {
    ys.push_back(new_empty_rows_as(x, weight.size(0)));
    y_data.push_back(ys.back().mutable_data_ptr());
  }
  if (m > 0) {
    const LoraPackConfig config = pack_forward_config(problem, device_limits(call.device));
    const Counters counters(x, call, config.launch.counters);
    const LoraPackParams p = pack_forward_params(problem, y_data, parts_of(s, problem), config, counters.data());
    const cudaError_t error = with_element(problem[0].x.type, [&]<class Element>(std::type_identity<Element>) {
      return launch_lora_pack<Element>(p, config, call.stream);
    });
    check_cuda(error, "lora_pack");
  }
  return {ys, s};
}

std::tuple<Tensor, Tensors, Tensors> lora_pack_backward(Tensors grad_ys, Tensor x, Tensor s, Tensors weights,
                                                        Tensors lora_As, Tensors lora_Bs, std::optional<Tensor> seed,
                                                        std::vector<double> scalings, std::vector<double> dropout_p,
                                                        bool need_x, std::vector<bool> need_A, std::vector<bool> need_B,
                                                        std::string) {
  check_lora_pack_backward(grad_ys, x, s, weights, lora_As, lora_Bs, seed, scalings, dropout_p, need_A, need_B);
  const CudaCall call(x);
  const PackOperands operands(x, weights, lora_As, lora_Bs, {}, seed, scalings, dropout_p);
  const LoraPackProblem& problem = operands.problem;
  const int64_t m = problem[0].m(), k = problem[0].k();
  const DeviceLimits device = device_limits(call.device);
  const Tensor grad_s = new_empty_as(x, {m * total_rank(lora_As)});
  const std::vector<void*> saved = parts_of(s, problem), grad_ss = parts_of(grad_s, problem);
  Tensors grads, grad_As, grad_Bs;
  std::vector<LoraBackwardProblem> members;
  std::vector<LoraGradsConfig> configs;
  int64_t counters_needed = 0, partials_needed = 0;
  bool need_any_A = false;
  for (size_t i = 0; i < problem.size(); ++i) {
    const LoraProblem& f = problem[i];
    const bool need_a = need_A[i] && f.rank() > 0, need_b = need_B[i] && f.rank() > 0;
    need_any_A = need_any_A || need_a;
    grads.push_back(whole_rows(grad_ys[i]));
    members.push_back({.forward = f,
                       .grad_y = ref_of(grads.back()),
                       .s = {saved[i], f.rank(), m, f.rank(), f.x.type},
                       .need_x = need_x,
                       .need_a = need_a,
                       .need_b = need_b});
    configs.push_back(
        lora_grads_config(m, need_b ? f.n() : 0, need_a ? f.k() : 0, f.rank(), 0, members.back().access(), device));
    counters_needed += configs.back().counters;
    partials_needed = std::max(partials_needed, configs.back().partials);
    const ScalarType type = is_fp32(lora_As[i]) ? ScalarType::Float : x.scalar_type();
    grad_As.push_back(need_A[i] ? new_empty_as(x, {f.rank(), k}, type) : new_empty_as(x, {0}, type));
    grad_Bs.push_back(need_B[i] ? new_empty_as(x, {f.n(), f.rank()}, type) : new_empty_as(x, {0}, type));
  }
  const Tensor grad_x = need_x ? new_empty_rows_as(x, k) : new_empty_as(x, {0});
  const LoraPackConfig config = m > 0 ? pack_grad_x_config(problem, need_x, need_any_A, device) : LoraPackConfig{};
  const Counters counters(x, call, config.launch.counters + counters_needed);
  const Floats partials(x, partials_needed);
  const LoraPackParams p =
      pack_grad_x_params(members, {grad_x.mutable_data_ptr(), k}, grad_ss, config, counters.data());
  const cudaError_t error = with_element(problem[0].x.type, [&]<class Element>(std::type_identity<Element>) {
    if (config.launch.blocks > 0) {
      const cudaError_t error = launch_lora_pack<Element>(p, config, call.stream);
      if (error != cudaSuccess) return error;
    }
    uint32_t* next = counters.data() + config.launch.counters;
    for (size_t i = 0; i < members.size(); ++i) {  // one after the other: the partials are everybody's
      if (m == 0 || configs[i].blocks == 0) continue;
      LoraBackwardConfig one{};
      one.grads = configs[i];
      const LoraGradsParams g = grads_params(members[i], members[i].need_a ? grad_As[i].mutable_data_ptr() : nullptr,
                                             members[i].need_b ? grad_Bs[i].mutable_data_ptr() : nullptr, one,
                                             {next, grad_ss[i], nullptr, partials.data()});
      const cudaError_t error = launch_lora_grads<Element>(g, configs[i], call.stream);
      if (error != cudaSuccess) return error;
      next += configs[i].counters;
    }
    return cudaSuccess;
  });
  check_cuda(error, "lora_pack_backward");
  for (size_t i = 0; i < members.size(); ++i) {
    for (Tensor* t : {&grad_As[i], &grad_Bs[i]}) {
      if (m == 0 && t->numel() > 0) torch::stable::zero_(*t);
    }
    grad_As[i] = cast(grad_As[i], lora_As[i].scalar_type());
    grad_Bs[i] = cast(grad_Bs[i], lora_Bs[i].scalar_type());
  }
  return {grad_x, grad_As, grad_Bs};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CUDA, m) {
  m.impl("lora_pack", TORCH_BOX(&lora_pack));
  m.impl("lora_pack_backward", TORCH_BOX(&lora_pack_backward));
}

}  // namespace lk
