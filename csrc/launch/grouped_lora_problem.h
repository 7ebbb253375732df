// A call of grouped_lora_linear, or of its gradients -> the configs and Params of its launches: once, for the binding,
// the plans and the tests' emulator. No torch, no CUDA.
#pragma once

#include <utility>

#include "../config/grouped_lora_linear.h"
#include "../params/grouped_lora_linear.h"
#include "lora_problem.h"

namespace lk {

// The problem of all rows with the first group's factors, and where the others' are. Ranks are whole chunks.
struct GroupedLoraProblem {
  LoraProblem first;    // w_in_columns: the weights are, and then b, or in the gradient of x a, is, too
  const int32_t* ends;  // [groups]
  int64_t groups;
  int64_t w_step, a_step, b_step, bias_step;  // bytes; 0: shared
  bool onto_y;  // the vendor makes the product with the weights, and w_in_columns is false

  RowGroups row_groups() const { return {.ends = ends, .count = static_cast<int32_t>(groups)}; }
};

inline GroupedLoraConfig grouped_forward_config(const GroupedLoraProblem& p, const DeviceLimits& device) {
  const LoraProblem& f = p.first;
  return grouped_lora_config(LoraRole::kForward, f.m(), f.n(), f.rank(), p.groups, !f.w_in_columns, p.onto_y, device);
}

inline GroupedLoraLinearParams grouped_forward_params(const GroupedLoraProblem& p, OutputRef y, void* s,
                                                      const GroupedLoraConfig& config, uint32_t* counters) {
  return {.lora = forward_params(p.first, y, s, config.launch, {.counters = counters, .partials = nullptr}),
          .groups = p.row_groups(),
          .w_step = p.w_step,
          .a_step = p.a_step,
          .b_step = p.b_step,
          .bias_step = p.bias_step,
          .row_blocks = static_cast<int32_t>(config.row_blocks)};
}

struct GroupedLoraBackwardConfig {
  GroupedLoraConfig grad_x;  // dX, where it is wanted, and s' = dY B, where that or dA is; else no blocks
  LoraGradsConfig grads;     // no blocks: neither dA nor dB is wanted
};

inline GroupedLoraBackwardConfig grouped_backward_config(const LoraBackwardProblem& p, const GroupedLoraProblem& groups,
                                                         const DeviceLimits& device) {
  const LoraProblem& f = p.forward;
  GroupedLoraBackwardConfig config{};
  if (p.need_x || p.need_a) {
    config.grad_x = grouped_lora_config(LoraRole::kGradX, f.m(), p.need_x ? f.k() : 0, f.rank(), groups.groups,
                                        !f.w_in_columns, groups.onto_y, device);
  }
  config.grads =
      grouped_lora_grads_config(f.m(), p.need_b ? f.n() : 0, p.need_a ? f.k() : 0, f.rank(), groups.groups, device);
  return config;
}

// counters: those of the first launch, then of the second.
inline GroupedLoraLinearParams grouped_grad_x_params(const LoraBackwardProblem& p, const GroupedLoraProblem& groups,
                                                     OutputRef grad_x, const GroupedLoraBackwardConfig& config,
                                                     const LoraBackwardWorkspace& workspace) {
  return {.lora = grad_x_params(p, grad_x, config.grad_x.launch, {}, workspace),
          .groups = groups.row_groups(),
          .w_step = groups.w_step,
          .a_step = groups.b_step,
          .b_step = groups.a_step,
          .bias_step = 0,
          .row_blocks = static_cast<int32_t>(config.grad_x.row_blocks)};
}

inline GroupedLoraGradsParams grouped_grads_params(const LoraBackwardProblem& p, const GroupedLoraProblem& groups,
                                                   void* grad_a, void* grad_b, const GroupedLoraBackwardConfig& config,
                                                   const LoraBackwardWorkspace& workspace) {
  LoraBackwardConfig launches{};
  launches.grad_x = config.grad_x.launch;
  launches.grads = config.grads;
  return {.lora = grads_params(p, grad_a, grad_b, launches, workspace), .groups = groups.row_groups()};
}

// ----------------------------------------------------------------------------------- what a launch may touch

// f(MemoryRef) for everything that a launch reads or writes, other than the counters: each group's factors.
template <class F>
void for_each_range(const GroupedLoraLinearParams& p, const GroupedLoraConfig& config, int element_bytes, const F& f) {
  const auto at = [](const void* first, int64_t bytes) {
    return first == nullptr ? nullptr : static_cast<const char*>(first) + bytes;
  };
  f(MemoryRef{p.groups.ends, 1, p.groups.count, p.groups.count, sizeof(int32_t), false});
  for (int64_t g = 0; g < p.groups.count; ++g) {
    LoraLinearParams one = p.lora;
    one.w = at(one.w, g * p.w_step);
    one.a = at(one.a, g * p.a_step);
    one.b = at(one.b, g * p.b_step);
    one.bias = at(one.bias, g * p.bias_step);
    for_each_range(one, config.launch, element_bytes, [&](MemoryRef ref) {
      if ((g > 0 && ref.is_written) || (config.key.onto_y && ref.data == one.w)) return;
      if (ref.data == one.y) ref.is_written = !config.key.onto_y;  // what is there is read
      // w and b then lie the other way round than the role has them.
      if (!config.key.w_in_rows && (ref.data == one.w || ref.data == one.b)) std::swap(ref.rows, ref.columns);
      f(ref);
    });
  }
}

// The same of the gradients of the adapters.
template <class F>
void for_each_range(const GroupedLoraGradsParams& p, const LoraGradsConfig& config, int element_bytes, const F& f) {
  f(MemoryRef{p.groups.ends, 1, p.groups.count, p.groups.count, sizeof(int32_t), false});
  for_each_range(p.lora, config, element_bytes, [&](MemoryRef ref) {
    if (ref.data == p.lora.grad_a || ref.data == p.lora.grad_b) ref.rows *= p.groups.count;
    f(ref);
  });
}

}  // namespace lk
