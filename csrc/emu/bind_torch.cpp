// The CUDA bindings as they are, over CPU tensors and emulated launches, as ops of `lora_kernels_emulated`. Test only.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../bind/cuda_counters.h"
#include "../kernels/lora_linear_variants.cuh"
#include "../launch/launch.h"

// In place of libtorch_cuda.
extern "C" {
AOTITorchError aoti_torch_create_cuda_guard(int32_t, CUDAGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = lk::emu::runtime.stream;
  return AOTI_TORCH_SUCCESS;
}
}

namespace lk {
namespace {

// Of the last launch.
struct Launch {
  bool aligned;
  const void *x, *w, *a, *b;
  const void* counters;
  bool counters_were_zero;
} last;

emu::Range rows_range(const void* data, int64_t rows, int64_t columns, int64_t stride) {
  return {data, rows == 0 ? 0 : ((rows - 1) * stride + columns) * sizeof(uint16_t)};
}

void poison(uint16_t* data, int64_t rows, int64_t columns, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) std::fill_n(data + row * stride, columns, uint16_t{0xFFFF});  // NaN
}

template <class Element>
cudaError_t launch(const LoraLinearParams& p, const LoraLinearConfig& config) {
  const auto is_zero = [](uint32_t word) { return word == 0; };
  last = {
      config.aligned, p.x, p.w, p.a, p.b, p.counters, std::all_of(p.counters, p.counters + config.counters, is_zero)};
  if (emu::runtime.fail_launches) {
    *p.counters = 1;
    return cudaErrorLaunchFailure;
  }
  poison(p.y, p.m, p.n, p.y_stride);
  poison(p.s, p.m, p.rank, p.rank);
  std::vector<emu::Range> global = {rows_range(p.x, p.m, p.k, p.x_stride),    rows_range(p.w, p.n, p.k, p.w_stride),
                                    rows_range(p.a, p.rank, p.k, p.a_stride), rows_range(p.b, p.n, p.rank, p.b_stride),
                                    rows_range(p.y, p.m, p.n, p.y_stride),    rows_range(p.s, p.m, p.rank, p.rank)};
  global.push_back({p.counters, config.counters * sizeof(uint32_t)});
  if (p.bias != nullptr) global.push_back({p.bias, p.n * sizeof(uint16_t)});
  if (p.seed != nullptr) global.push_back({p.seed, sizeof *p.seed});
  with_lora_linear_variant<Element>(config, [&](auto variant) {
    using Variant = decltype(variant);
    emu::launch(static_cast<int>(config.blocks), Variant::kThreads, Variant::kSharedBytes, global, {},
                [&] { lora_linear_kernel<Variant>(p); });
  });
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_lora_linear_bf16(const LoraLinearParams& p, const LoraLinearConfig& config, cudaStream_t) {
  return launch<BFloat16>(p, config);
}

cudaError_t launch_lora_linear_fp16(const LoraLinearParams& p, const LoraLinearConfig& config, cudaStream_t) {
  return launch<Float16>(p, config);
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
    d["x"] = address(lk::last.x);
    d["weight"] = address(lk::last.w);
    d["lora_A"] = address(lk::last.a);
    d["lora_B"] = address(lk::last.b);
    d["counters"] = address(lk::last.counters);
    d["counters_were_zero"] = lk::last.counters_were_zero;
    return d;
  });
}
