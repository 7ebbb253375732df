// A call of multi_lora_linear, or of its gradients -> the configs and Params of its launches: once, for the binding,
// the plans and the tests' emulator. No torch, no CUDA.
#pragma once

#include <utility>

#include "../config/multi_lora_linear.h"
#include "../params/multi_lora_linear.h"
#include "lora_problem.h"

namespace lk {

// The problem of all rows with the first adapter's factors, and where the others' are.
struct MultiLoraProblem {
  LoraProblem first;   // w_in_columns: no kernel of ours reads w
  AdapterPools pools;  // whether ranks are whole: what launched_pools says
  Integers ids;

  int64_t adapters() const { return pools.count; }
  bool w_is_whole() const { return !first.w_in_columns && first.w.aligned() && first.w.stride <= kMaxRowStride; }
  bool ranks_are_whole() const {
    return first.is_whole(first.rank()) && first.b.aligned() && pools.b_step % kChunkBytes == 0;
  }
  AdapterPools launched_pools() const {
    AdapterPools launched = pools;
    launched.ranks_are_whole = ranks_are_whole();
    return launched;
  }
};

// Few rows are one launch, `decode`. Of more, and of those that it does not serve, the vendor makes the product with w.
struct MultiLoraForwardConfig {
  bool decodes;
  LoraLinearConfig decode;
  MultiLoraConfig shrink, expand;
};

inline MultiLoraForwardConfig multi_forward_config(const MultiLoraProblem& p, const DeviceLimits& device,
                                                   Wanted wanted) {
  const LoraProblem& f = p.first;
  MultiLoraForwardConfig config{};
  config.decodes = wanted != Wanted::kCublas && decodes_adapters(f.m(), p.w_is_whole(), f.seed != nullptr);
  if (config.decodes) {
    config.decode = multi_lora_decode_config(f.m(), f.n(), f.k(), f.rank(), f.element_bytes(), device);
  } else {
    config.shrink =
        multi_lora_shrink_config(LoraRole::kForward, f.m(), f.k(), f.rank(), p.adapters(), f.element_bytes(), device);
    config.expand = multi_lora_expand_config(LoraRole::kForward, f.m(), f.n(), p.adapters());
  }
  return config;
}

inline MultiLoraDecodeParams multi_decode_params(const MultiLoraProblem& p, OutputRef y, void* s,
                                                 const LoraLinearConfig& config, const LoraWorkspace& workspace) {
  return {.lora = forward_params(p.first, y, s, config, workspace), .pools = p.launched_pools(), .ids = p.ids};
}

// The rows of each adapter: [m] and [adapters].
struct RowOrder {
  int32_t *rows, *ends;
};

inline MultiLoraOrderParams multi_order_params(const MultiLoraProblem& p, const RowOrder& order) {
  return {.m = static_cast<int32_t>(p.first.m()),
          .count = p.pools.count,
          .ids = p.ids,
          .rows = order.rows,
          .ends = order.ends};
}

inline MultiLoraBranchParams multi_branch_params(const MultiLoraProblem& p, const LoraLinearParams& lora,
                                                 const RowOrder& order) {
  return {.lora = lora,
          .groups = {.ends = order.ends, .count = p.pools.count},
          .pools = p.launched_pools(),
          .order = order.rows};
}

// s, zero where no adapter has ranks; or y, where the product with w and the bias are, and the branch is added.
inline MultiLoraBranchParams multi_forward_params(const MultiLoraProblem& p, OutputRef y, void* s,
                                                  const MultiLoraConfig& config, const LoraWorkspace& workspace,
                                                  const RowOrder& order) {
  LoraLinearParams lora = forward_params(p.first, y, s, config.launch, workspace);
  lora.bias = nullptr;
  return multi_branch_params(p, lora, order);
}

struct MultiLoraBackwardConfig {
  MultiLoraConfig shrink, expand;  // s' = dY B, where dX or dA is wanted, and dX's branch; else no blocks
  LoraGradsConfig grads;           // no blocks: neither dA nor dB is wanted
};

inline MultiLoraBackwardConfig multi_backward_config(const LoraBackwardProblem& p, const MultiLoraProblem& multi,
                                                     const DeviceLimits& device) {
  const LoraProblem& f = p.forward;
  MultiLoraBackwardConfig config{};
  const bool has_rows = f.m() > 0;
  if (has_rows && (p.need_x || p.need_a)) {
    config.shrink =
        multi_lora_shrink_config(LoraRole::kGradX, f.m(), f.n(), f.rank(), multi.adapters(), f.element_bytes(), device);
  }
  if (has_rows && p.need_x) {
    config.expand = multi_lora_expand_config(LoraRole::kGradX, f.m(), f.k(), multi.adapters());
  }
  const bool s_is_whole = f.is_whole(f.rank()) && p.s.aligned();
  config.grads = multi_lora_grads_config(f.m(), p.need_b ? f.n() : 0, p.need_a ? f.k() : 0, f.rank(), multi.adapters(),
                                         s_is_whole, device);
  return config;
}

// counters and partials: those of s', then of dA and dB.
inline MultiLoraBranchParams multi_grad_x_params(const LoraBackwardProblem& p, const MultiLoraProblem& multi,
                                                 OutputRef grad_x, const MultiLoraConfig& config,
                                                 const LoraBackwardWorkspace& workspace, const RowOrder& order) {
  MultiLoraBranchParams params =
      multi_branch_params(multi, grad_x_params(p, grad_x, config.launch, {}, workspace), order);
  std::swap(params.pools.a_step, params.pools.b_step);
  return params;
}

inline MultiLoraGradsParams multi_grads_params(const LoraBackwardProblem& p, const MultiLoraProblem& multi,
                                               void* grad_a, void* grad_b, const MultiLoraBackwardConfig& config,
                                               const LoraBackwardWorkspace& workspace, const RowOrder& order) {
  LoraBackwardConfig launches{};
  launches.grad_x = config.shrink.launch;
  launches.grads = config.grads;
  return {.lora = grads_params(p, grad_a, grad_b, launches, workspace),
          .groups = {.ends = order.ends, .count = multi.pools.count},
          .pools = multi.launched_pools(),
          .order = order.rows};
}

}  // namespace lk
