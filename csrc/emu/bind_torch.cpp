// The CUDA bindings as they are, over CPU tensors and emulated launches, as ops of `lora_kernels_emulated`. Test only.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../bind/cuda_counters.h"
#include "../kernels/lora_linear_variants.cuh"
#include "../launch/lora_linear.h"
#include "torch_shims.h"

namespace lk {
namespace {

// Of the last forward's launch.
struct Launch {
  bool aligned;
  const char* schedule;
  const void *x, *w, *a, *b;
  const void* counters;
  bool counters_were_zero;
} last;

emu::Range rows_range(const void* data, int64_t rows, int64_t columns, int64_t stride, size_t element_size) {
  return {data, rows == 0 || columns == 0 ? 0 : ((rows - 1) * stride + columns) * element_size};
}

void poison(void* data, int64_t rows, int64_t columns, int64_t stride, size_t element_size) {
  for (int64_t row = 0; row < rows; ++row) {
    std::memset(static_cast<char*>(data) + row * stride * element_size, 0xFF, columns * element_size);  // NaN
  }
}

template <class Element>
constexpr size_t kSize = sizeof(typename Element::Storage);

bool all_zero(const uint32_t* words, int64_t count) {
  return std::all_of(words, words + count, [](uint32_t word) { return word == 0; });
}

// Outputs and workspace of the launch become NaN; returns what the kernel may touch.
std::vector<emu::Range> prepare(const LoraLinearParams& p, const LoraLinearConfig& config, Layout adapters,
                                size_t element_size) {
  poison(p.y, p.m, p.n, p.y_stride, element_size);
  if (p.s != nullptr) poison(p.s, p.m, p.rank, p.rank, element_size);
  std::fill_n(p.partials, config.partials, NAN);
  const size_t adapter_size = p.adapters_are_float ? 4 : element_size;
  const bool transposed = adapters == Layout::kColumns;
  const auto matrix = [&](const void* data, int64_t rows, int64_t columns, int64_t stride, size_t size) {
    return transposed ? rows_range(data, columns, rows, stride, size) : rows_range(data, rows, columns, stride, size);
  };
  std::vector<emu::Range> global = {
      rows_range(p.x, p.m, p.k, p.x_stride, element_size), matrix(p.w, p.n, p.k, p.w_stride, element_size),
      matrix(p.a, p.rank, p.k, p.a_stride, adapter_size),  matrix(p.b, p.n, p.rank, p.b_stride, adapter_size),
      rows_range(p.y, p.m, p.n, p.y_stride, element_size), rows_range(p.s, p.m, p.rank, p.rank, element_size),
      {p.counters, config.counters * sizeof(uint32_t)},    {p.partials, config.partials * sizeof(float)}};
  if (p.bias != nullptr) global.push_back({p.bias, p.n * element_size});
  if (p.seed != nullptr) global.push_back({p.seed, sizeof *p.seed});
  return global;
}

template <class Variant, class Params>
cudaError_t run(void (*kernel)(Params), int64_t blocks, const Params& p, const std::vector<emu::Range>& global) {
  emu::launch(static_cast<int>(blocks), Variant::kThreads, Variant::kSharedBytes, global, {}, [&] { kernel(p); });
  return cudaSuccess;
}

}  // namespace

template <class Element>
cudaError_t launch_lora_linear(const LoraLinearParams& p, const LoraLinearConfig& config, cudaStream_t) {
  last = {
      config.aligned, name_of(config.schedule), p.x, p.w, p.a, p.b, p.counters, all_zero(p.counters, config.counters)};
  if (emu::runtime.fail_launches) {
    *p.counters = 1;
    return cudaErrorLaunchFailure;
  }
  const auto global = prepare(p, config, Layout::kRows, kSize<Element>);
  return with_lora_linear_variant<Element>(config, [&](auto variant) {
    using Variant = decltype(variant);
    return run<Variant>(&lora_linear_kernel<Variant>, config.blocks, p, global);
  });
}

template <class Element>
cudaError_t launch_lora_grad_x(const LoraLinearParams& p, const LoraLinearConfig& config, cudaStream_t) {
  auto global = prepare(p, config, Layout::kColumns, kSize<Element>);
  global.push_back(rows_range(p.saved_s, p.m, p.rank, p.rank, kSize<Element>));
  if (p.partial_grad_b != nullptr) {
    const int64_t floats = blocks_of(p.m, tile_shape(config.tile).rows) * p.k * 16;
    std::fill_n(p.partial_grad_b, floats, NAN);
    global.push_back({p.partial_grad_b, floats * sizeof(float)});
  }
  return with_lora_grad_x_variant<Element>(config, [&](auto variant) {
    using Variant = decltype(variant);
    return run<Variant>(&lora_linear_kernel<Variant>, config.blocks, p, global);
  });
}

template <class Element>
cudaError_t launch_lora_grads(const LoraGradsParams& p, const LoraGradsConfig& config, cudaStream_t) {
  const size_t size = p.grads_are_float ? 4 : kSize<Element>;
  std::fill_n(p.partials, config.partials, NAN);
  std::vector<emu::Range> global = {rows_range(p.x, p.m, p.k, p.x_stride, kSize<Element>),
                                    rows_range(p.grad_y, p.m, p.n, p.grad_y_stride, kSize<Element>),
                                    rows_range(p.s, p.m, p.rank, p.rank, kSize<Element>),
                                    rows_range(p.grad_s, p.m, p.rank, p.rank, kSize<Element>),
                                    {p.counters, config.counters * sizeof(uint32_t)},
                                    {p.partials, config.partials * sizeof(float)},
                                    {p.partial_grad_b, p.parts_of_grad_b * p.n * 16 * sizeof(float)}};
  const std::pair<void*, int64_t> grads[] = {{p.grad_a, p.rank * p.k}, {p.grad_b, p.n * p.rank}};
  for (const auto& [grad, elements] : grads) {
    if (grad == nullptr) continue;
    std::memset(grad, 0xFF, elements * size);  // NaN
    global.push_back({grad, elements * size});
  }
  if (p.seed != nullptr) global.push_back({p.seed, sizeof *p.seed});
  return with_lora_grads_variant<Element>(config, [&](auto variant) {
    using Variant = decltype(variant);
    return run<Variant>(&lora_grads_kernel<Variant>, config.blocks, p, global);
  });
}

}  // namespace lk

#define CUDA CPU
#define lora_kernels_native lora_kernels_emulated
#include "../bind/lora_linear_cuda.cpp"
#undef CUDA

namespace py = pybind11;

PYBIND11_MODULE(_emu_torch, m) {
  using lk::emu::runtime;
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  m.def("capture", [](bool on) { runtime.capturing = on; });
  m.def("fail_launches", [](bool on) { runtime.fail_launches = on; });
  m.def("set_stream", [](uintptr_t stream) { runtime.stream = reinterpret_cast<cudaStream_t>(stream); });
  m.def("memsets", [] { return runtime.memsets; });
  m.def("last_launch", [=] {
    py::dict d;
    d["aligned"] = lk::last.aligned;
    d["schedule"] = lk::last.schedule;
    d["x"] = address(lk::last.x);
    d["weight"] = address(lk::last.w);
    d["lora_A"] = address(lk::last.a);
    d["lora_B"] = address(lk::last.b);
    d["counters"] = address(lk::last.counters);
    d["counters_were_zero"] = lk::last.counters_were_zero;
    return d;
  });
}
