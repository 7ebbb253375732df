// The launches of lora_linear and its gradients, emulated. Results and workspace are NaN before, results lie in rows
// that are apart, and a launch that leaves a counter other than zero is an error.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "../kernels/lora_linear_variants.cuh"
#include "../launch/lora_linear.h"
#include "lora_memory.h"

namespace lk {

struct LoraLaunch {
  const char* schedule;
  Access access;
  const void *x = nullptr, *w = nullptr, *a = nullptr, *b = nullptr;
  const uint32_t* counters = nullptr;
  bool counters_were_zero = true;
  cudaStream_t stream = nullptr;
  emu::Report report = {};
};

inline std::vector<LoraLaunch> lora_launches;   // since the test last asked
inline std::vector<unsigned char> last_grad_s;  // dY B, as the second launch of a backward finds it

inline bool all_zero(const uint32_t* words, int64_t count) {
  return std::all_of(words, words + count, [](uint32_t word) { return word == 0; });
}

template <class Variant, class Params, class Config>
void run_lora(void (*kernel)(Params), const Params& p, const Config& config, const Memory& memory) {
  Memory all = memory;
  all.input(p.counters, sizeof(uint32_t), 1, config.counters, 0);
  lora_launches.back().report = emulate<Variant>(kernel, config.blocks, p, all);
  if (!all_zero(p.counters, config.counters)) throw std::runtime_error("the launch left a counter other than zero");
}

template <class Kernel>
cudaError_t run_lora_linear(const LoraLinearParams& p, const LoraLinearConfig& config, cudaStream_t stream) {
  constexpr int kBytes = sizeof(typename Kernel::Element::Storage);
  lora_launches.push_back({.schedule = name_of(config.key.schedule),
                           .access = config.key.access,
                           .x = p.x,
                           .w = p.w,
                           .a = p.a,
                           .b = p.b,
                           .counters = p.counters,
                           .counters_were_zero = all_zero(p.counters, config.counters),
                           .stream = stream});
  if (emu::runtime.fail_launches) {
    *p.counters = 1;
    return cudaErrorLaunchFailure;
  }
  RowsApart y(p.y, p.m, p.n, kBytes);
  LoraLinearParams apart = p;
  apart.y = y.data();
  apart.y_stride = y.stride();
  Memory memory;
  for_each_range(apart, config, kBytes, [&](const MemoryRef& ref) { add(memory, ref); });
  run_lora<Kernel>(&lora_linear_kernel<Kernel>, apart, config, memory);
  y.copy_back();
  return cudaSuccess;
}

template <class Element>
cudaError_t launch_lora_linear(const LoraLinearParams& p, const LoraLinearConfig& config, cudaStream_t stream) {
  if (config.blocks == 0) return cudaSuccess;
  return with_variant(LoraForwardVariants<Element>{}, config.key,
                      [&]<class Kernel>(Kernel) { return run_lora_linear<Kernel>(p, config, stream); });
}

template <class Element>
cudaError_t launch_lora_grad_x(const LoraLinearParams& p, const LoraLinearConfig& config, cudaStream_t stream) {
  if (config.blocks == 0) return cudaSuccess;
  return with_variant(LoraGradXVariants<Element>{}, config.key,
                      [&]<class Kernel>(Kernel) { return run_lora_linear<Kernel>(p, config, stream); });
}

template <class Element>
cudaError_t launch_lora_grads(const LoraGradsParams& p, const LoraGradsConfig& config, cudaStream_t stream) {
  constexpr int kBytes = sizeof(typename Element::Storage);
  const auto* const grad_s = static_cast<const unsigned char*>(p.grad_s);
  last_grad_s.assign(grad_s, grad_s + static_cast<int64_t>(p.m) * p.rank * kBytes);
  lora_launches.push_back({.schedule = "split rows",
                           .access = config.key.access,
                           .counters = p.counters,
                           .counters_were_zero = all_zero(p.counters, config.counters),
                           .stream = stream});
  Memory memory;
  for_each_range(p, config, kBytes, [&](const MemoryRef& ref) { add(memory, ref); });
  return with_variant(LoraGradsVariants<Element>{}, config.key, [&]<class Kernel>(Kernel) {
    run_lora<Kernel>(&lora_grads_kernel<Kernel>, p, config, memory);
    return cudaSuccess;
  });
}

}  // namespace lk
