// The launches of lora_linear and its gradients, emulated. Results and workspace are NaN before, results lie in rows
// that are apart, and a launch that leaves a counter other than zero is an error.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <new>
#include <stdexcept>
#include <vector>

#include "../kernels/lora_linear_variants.cuh"
#include "../launch/lora_linear.h"
#include "../launch/lora_problem.h"
#include "launches.h"

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

inline void add(Memory& memory, const MemoryRef& ref) {
  if (!ref.is_written) return memory.input(ref.data, ref.element_bytes, ref.rows, ref.columns, ref.stride);
  auto* const first = static_cast<unsigned char*>(const_cast<void*>(ref.data));
  const int64_t row_bytes = ref.columns * ref.element_bytes;
  if (ref.stride == ref.columns) return memory.output(first, ref.rows * row_bytes);
  // The gaps between rows that lie apart are nobody's.
  for (int64_t row = 0; row < ref.rows; ++row) memory.output(first + row * ref.stride * ref.element_bytes, row_bytes);
}

inline int64_t row_gap = 8;  // elements: whole chunks of any element

// Rows that lie apart, as a caller's may, in the place of contiguous ones. What no row lies in takes no memory.
class RowsApart {
 public:
  RowsApart(void* rows, int64_t count, int64_t columns, int element_bytes)
      : rows_(static_cast<unsigned char*>(rows)),
        count_(columns == 0 ? 0 : count),
        stride_(columns + row_gap),
        row_bytes_(columns * element_bytes),
        stride_bytes_(stride_ * element_bytes) {
    if (count_ == 0) return;
    void* const memory =
        mmap(nullptr, bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    apart_ = static_cast<unsigned char*>(memory);
  }
  RowsApart(const RowsApart&) = delete;
  RowsApart& operator=(const RowsApart&) = delete;
  ~RowsApart() {
    if (apart_ != nullptr) munmap(apart_, bytes());
  }

  void* data() { return apart_; }
  int64_t stride() const { return stride_; }

  void copy_back() const {
    for (int64_t row = 0; row < count_; ++row) {
      std::memcpy(rows_ + row * row_bytes_, apart_ + row * stride_bytes_, row_bytes_);
    }
  }

 private:
  size_t bytes() const { return static_cast<size_t>(count_ * stride_bytes_); }

  unsigned char* const rows_;
  const int64_t count_, stride_, row_bytes_, stride_bytes_;
  unsigned char* apart_ = nullptr;
};

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
