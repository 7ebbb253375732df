// The CUDA binding of grouped_lora_linear and its gradients as it is, over CPU tensors and emulated launches: ops of
// `lora_kernels_emulated_grouped`. Test only.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "../kernels/grouped_lora_linear_variants.cuh"
#include "../launch/grouped_lora_linear.h"
#include "../launch/grouped_lora_problem.h"
#include "launch_over_torch.h"

namespace lk {

struct GroupedLaunch {
  int tile_rows;  // of dA and dB: those of a part
  int64_t blocks;
  int counters;
  bool onto_y, counters_were_zero;
  emu::Report report = {};
};
inline std::vector<GroupedLaunch> launches;  // since the test last asked
inline std::vector<unsigned char> last_s;    // or dY B, with whole ranks

template <class Kernel, class Params, class Config>
void run_grouped(void (*kernel)(Params), const Params& p, const Config& config, int tile_rows, int64_t blocks,
                 int64_t counters, int64_t partials, bool onto_y, int element_bytes) {
  const auto all_zero = [&] {
    return std::all_of(p.lora.counters, p.lora.counters + counters, [](uint32_t word) { return word == 0; });
  };
  launches.push_back({.tile_rows = tile_rows,
                      .blocks = blocks,
                      .counters = static_cast<int>(counters),
                      .onto_y = onto_y,
                      .counters_were_zero = all_zero()});
  check_is_allocated(p.lora.counters, counters * static_cast<int64_t>(sizeof(uint32_t)));
  check_is_allocated(p.lora.partials, partials * static_cast<int64_t>(sizeof(float)));
  Memory memory;
  for_each_range(p, config, element_bytes, [&](const MemoryRef& ref) {
    if (ref.is_written) {
      memory.output(const_cast<void*>(ref.data), ref.rows * ref.columns * ref.element_bytes);
    } else {
      memory.input(ref.data, ref.element_bytes, ref.rows, ref.columns, ref.stride);
    }
  });
  memory.input(p.lora.counters, sizeof(uint32_t), 1, counters, 0);
  launches.back().report = emulate<Kernel>(kernel, blocks, p, memory);
  if (!all_zero()) throw std::runtime_error("the launch left a counter other than zero");
}

template <class Element>
cudaError_t launch_grouped_lora(const GroupedLoraLinearParams& p, const GroupedLoraConfig& config, cudaStream_t) {
  using All = Concat<GroupedForwardVariants<Element>, GroupedGradXVariants<Element>>;
  constexpr int kBytes = sizeof(typename Element::Storage);
  return with_variant(All{}, config.key, [&]<class Kernel>(Kernel) {
    run_grouped<Kernel>(&grouped_lora_linear_kernel<Kernel>, p, config, tile_shape(config.key.tile).rows,
                        config.launch.blocks, config.launch.counters, 0, config.key.onto_y, kBytes);
    const auto* const s = static_cast<const unsigned char*>(p.lora.s);
    last_s.assign(s, s + static_cast<int64_t>(p.lora.m) * p.lora.rank * kBytes);
    return cudaSuccess;
  });
}

template <class Element>
cudaError_t launch_grouped_lora_grads(const GroupedLoraGradsParams& p, const LoraGradsConfig& config, cudaStream_t) {
  return with_variant(GroupedGradsVariants<Element>{}, config.key, [&]<class Kernel>(Kernel) {
    run_grouped<Kernel>(&grouped_lora_grads_kernel<Kernel>, p, config, config.split_rows, config.blocks,
                        config.counters, config.partials, false, sizeof(typename Element::Storage));
    return cudaSuccess;
  });
}

}  // namespace lk

#define CUDA CPU
#define lora_kernels_native lora_kernels_emulated_grouped
#define aoti_torch_empty_strided lk::noted_empty_strided
#include "../bind/grouped_lora_linear_cuda.cpp"
#undef CUDA
#undef aoti_torch_empty_strided

namespace lk {
namespace {

pybind11::dict to_python(const GroupedLaunch& launch) {
  pybind11::dict d;
  d["tile_rows"] = launch.tile_rows;
  d["blocks"] = launch.blocks;
  d["counters"] = launch.counters;
  d["onto_y"] = launch.onto_y;
  d["counters_were_zero"] = launch.counters_were_zero;
  d["report"] = launch.report;
  return d;
}

}  // namespace
}  // namespace lk

PYBIND11_MODULE(_emu_grouped_lora_linear, m) {
  lk::define_options(m);
  lk::define_device(m);
  m.def("launches", [] {
    pybind11::list all;
    for (const lk::GroupedLaunch& launch : lk::launches) all.append(lk::to_python(launch));
    lk::launches.clear();
    lk::allocations.clear();
    return all;
  });
  m.def("s", [] { return pybind11::bytes(reinterpret_cast<const char*>(lk::last_s.data()), lk::last_s.size()); });
}
