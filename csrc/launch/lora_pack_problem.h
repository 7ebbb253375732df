// A call of lora_pack, or of its gradients -> the configs and Params of its launches: once, for the binding, the plans
// and the tests' emulator. No torch, no CUDA.
#pragma once

#include <vector>

#include "../config/lora_pack.h"
#include "lora_problem.h"

namespace lk {

// Members of one x, each a problem of its own; seed_step is its place's.
using LoraPackProblem = std::vector<LoraProblem>;

inline PackSizes sizes_of(const LoraPackProblem& p) {
  PackSizes sizes{};
  for (const LoraProblem& member : p) {
    sizes.n[sizes.count] = member.n();
    sizes.rank[sizes.count++] = member.rank();
  }
  return sizes;
}

// Whether the kernels read every row in chunks.
inline bool is_served(const LoraPackProblem& p) {
  return p.size() <= kMaxMembers && std::all_of(p.begin(), p.end(), [](const LoraProblem& member) {
           return !member.w_in_columns && member.access() == Access::kWhole && member.is_whole(member.n());
         });
}

inline LoraPackConfig pack_forward_config(const LoraPackProblem& p, const DeviceLimits& device) {
  const PackSizes sizes = sizes_of(p);
  return lora_pack_config(LoraRole::kForward, p[0].m(), sizes, sizes.total_n(), device);
}

inline LoraPackParams pack_params(const LoraPackConfig& config, size_t count) {
  LoraPackParams params{};
  params.count = static_cast<int32_t>(count);
  params.shrink_columns = config.shrink_columns;
  params.base_columns = config.base_columns;
  return params;
}

// ys and ss: of each member, [m, n] and [m, rank], contiguous.
inline LoraPackParams pack_forward_params(const LoraPackProblem& p, const std::vector<void*>& ys,
                                          const std::vector<void*>& ss, const LoraPackConfig& config,
                                          uint32_t* counters) {
  LoraPackParams params = pack_params(config, p.size());
  for (size_t i = 0; i < p.size(); ++i) {
    params.members[i] = forward_params(p[i], {ys[i], p[i].n()}, ss[i], config.launch, {counters, nullptr});
  }
  return params;
}

// dX, where it is wanted, and s' = dY B, where that or a dA is; else no blocks.
inline LoraPackConfig pack_grad_x_config(const LoraPackProblem& p, bool need_x, bool need_s,
                                         const DeviceLimits& device) {
  if (!need_x && !need_s) return {};
  return lora_pack_config(LoraRole::kGradX, p[0].m(), sizes_of(p), need_x ? p[0].k() : 0, device);
}

// grad_ss: of each member, [m, rank], contiguous. grad_x: [m, k].
inline LoraPackParams pack_grad_x_params(const std::vector<LoraBackwardProblem>& p, OutputRef grad_x,
                                         const std::vector<void*>& grad_ss, const LoraPackConfig& config,
                                         uint32_t* counters) {
  LoraPackParams params = pack_params(config, p.size());
  for (size_t i = 0; i < p.size(); ++i) {
    params.members[i] =
        grad_x_params(p[i], grad_x, config.launch, {},
                      {.counters = counters, .grad_s = grad_ss[i], .partial_grad_b = nullptr, .partials = nullptr});
  }
  return params;
}

// ----------------------------------------------------------------------------------- what a launch may touch

// f(MemoryRef) for everything that a launch reads or writes, other than the counters.
template <class F>
void for_each_range(const LoraPackParams& p, const LoraPackConfig& config, int element_bytes, const F& f) {
  for (int i = 0; i < p.count; ++i) {
    for_each_range(p.members[i], config.launch, element_bytes, [&](const MemoryRef& ref) {
      const bool is_everybodys = i > 0 && ref.is_written && ref.data == p.members[0].y;
      if (!is_everybodys && ref.rows * ref.columns > 0) f(ref);
    });
  }
}

}  // namespace lk
