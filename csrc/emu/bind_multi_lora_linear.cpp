// The CUDA binding of multi_lora_linear and its gradients as it is, over CPU tensors and emulated launches: ops of
// `lora_kernels_emulated_multi`. Test only.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "../kernels/multi_lora_linear_variants.cuh"
#include "../kernels/multi_lora_order.cuh"
#include "../launch/multi_lora_linear.h"
#include "../launch/multi_lora_problem.h"
#include "launch_over_torch.h"

namespace lk {

struct MultiLaunch {
  const char* name;
  int64_t blocks;
  int64_t counters = 0;
  bool counters_were_zero = true;
  emu::Report report = {};
};
inline std::vector<MultiLaunch> launches;  // since the test last asked
inline std::vector<unsigned char> last_s;  // or dY B

// What every launch may touch besides what it writes.
struct Inputs : Memory {
  void workspace(float* partials, int64_t count) {
    check_is_allocated(partials, count * static_cast<int64_t>(sizeof(float)));
    output(partials, count * sizeof(float));
  }
  void integers(const Integers& t, int64_t count) { input(t.data, t.are_wide ? 8 : 4, count, 1, t.stride); }
  void pools(const AdapterPools& p) {
    integers(p.ranks, p.count);
    input(p.scalings, sizeof(float), p.count, 1, p.scalings_step);
  }
  // Of each adapter.
  void factor(const void* first, int64_t step, int count, size_t element, int64_t rows, int64_t columns,
              int64_t stride) {
    for (int i = 0; i < count; ++i) {
      input(static_cast<const char*>(first) + i * step, element, rows, columns, stride);
    }
  }
};

bool all_zero(const uint32_t* begin, const uint32_t* end) {
  return std::all_of(begin, end, [](uint32_t word) { return word == 0; });
}

// kept: of the counters, the first so many are not set back.
template <class Kernel, class Params>
cudaError_t run_multi(const char* name, void (*kernel)(Params), int64_t blocks, const Params& p, Inputs memory,
                      const uint32_t* counters, int64_t count, int kept = 0) {
  if (blocks == 0) return cudaSuccess;
  const uint32_t* const end = counters + count;
  launches.push_back(
      {.name = name, .blocks = blocks, .counters = count, .counters_were_zero = all_zero(counters, end)});
  check_is_allocated(counters, count * static_cast<int64_t>(sizeof(uint32_t)));
  memory.input(counters, sizeof(uint32_t), 1, count, 0);
  launches.back().report = emulate<Kernel>(kernel, blocks, p, memory);
  if (!all_zero(counters + kept, end)) throw std::runtime_error("the launch left a counter other than zero");
  return cudaSuccess;
}

template <class Element>
cudaError_t launch_multi_lora_decode(const MultiLoraDecodeParams& p, const LoraLinearConfig& config, cudaStream_t) {
  constexpr size_t kBytes = sizeof(typename Element::Storage);
  const LoraLinearParams& all = p.lora;
  const size_t adapter = all.adapters_are_float ? 4 : kBytes;
  Inputs memory;
  memory.integers(p.ids, all.m);
  memory.pools(p.pools);
  memory.input(all.x, kBytes, all.m, all.k, all.x_stride);
  memory.input(all.w, kBytes, all.n, all.k, all.w_stride);
  memory.input(all.bias, kBytes, 1, all.n, 0);
  memory.factor(all.a, p.pools.a_step, p.pools.count, adapter, all.rank, all.k, all.a_stride);
  memory.factor(all.b, p.pools.b_step, p.pools.count, adapter, all.n, all.rank, all.b_stride);
  memory.output(all.y, static_cast<int64_t>(all.m) * all.n * kBytes);
  memory.output(all.s, static_cast<int64_t>(all.m) * all.rank * kBytes);
  memory.workspace(all.partials, config.partials);
  return with_variant(MultiDecodeVariants<Element>{}, config.key, [&]<class Kernel>(Kernel) {
    return run_multi<Kernel>("decode", &multi_lora_decode_kernel<Kernel>, config.blocks, p, memory, all.counters,
                             config.counters, 2);
  });
}

cudaError_t launch_multi_lora_order(const MultiLoraOrderParams& p, cudaStream_t) {
  Inputs memory;
  memory.integers(p.ids, p.m);
  memory.output(p.rows, p.m * sizeof(int32_t));
  memory.output(p.ends, p.count * sizeof(int32_t));
  return run_multi<MultiLoraOrder>("order", &multi_lora_order_kernel, p.count, p, memory, nullptr, 0);
}

template <class Element>
cudaError_t launch_multi_lora_branch(const MultiLoraBranchParams& p, const LoraLinearConfig& config, cudaStream_t) {
  constexpr size_t kBytes = sizeof(typename Element::Storage);
  const LoraLinearParams& all = p.lora;
  const size_t adapter = all.adapters_are_float ? 4 : kBytes;
  const bool shrinks = config.key.schedule == Schedule::kShrink, is_backward = config.key.role == LoraRole::kGradX;
  const auto rows = [&](int64_t a, int64_t b) { return is_backward ? b : a; };
  Inputs memory;
  memory.pools(p.pools);
  memory.input(p.groups.ends, sizeof(int32_t), 1, p.groups.count, 0);
  memory.input(p.order, sizeof(int32_t), 1, all.m, 0);
  memory.input(all.seed, sizeof(int64_t), 1, 1, 0);
  memory.input(all.s, kBytes, all.m, all.rank, all.rank);
  if (shrinks) {
    memory.input(all.x, kBytes, all.m, all.k, all.x_stride);
    memory.factor(all.a, p.pools.a_step, p.pools.count, adapter, rows(all.rank, all.k), rows(all.k, all.rank),
                  all.a_stride);
    memory.workspace(all.partials, config.partials);
  } else {
    memory.input(all.y, kBytes, all.m, all.n, all.y_stride);
    memory.factor(all.b, p.pools.b_step, p.pools.count, adapter, rows(all.n, all.rank), rows(all.rank, all.n),
                  all.b_stride);
  }
  return with_variant(MultiBranchVariants<Element>{}, config.key, [&]<class Kernel>(Kernel) {
    run_multi<Kernel>(name_of(config.key.schedule), &multi_lora_branch_kernel<Kernel>, config.blocks, p, memory,
                      all.counters, config.counters);
    const auto* const s = static_cast<const unsigned char*>(all.s);
    last_s.assign(s, s + static_cast<int64_t>(all.m) * all.rank * kBytes);
    return cudaSuccess;
  });
}

template <class Element>
cudaError_t launch_multi_lora_grads(const MultiLoraGradsParams& p, const LoraGradsConfig& config, cudaStream_t) {
  constexpr size_t kBytes = sizeof(typename Element::Storage);
  const LoraGradsParams& all = p.lora;
  const int64_t grad_bytes = all.grads_are_float ? 4 : kBytes, count = p.groups.count;
  Inputs memory;
  memory.pools(p.pools);
  memory.input(p.groups.ends, sizeof(int32_t), 1, count, 0);
  memory.input(p.order, sizeof(int32_t), 1, all.m, 0);
  memory.input(all.seed, sizeof(int64_t), 1, 1, 0);
  memory.input(all.x, kBytes, all.m, all.k, all.x_stride);
  memory.input(all.grad_y, kBytes, all.m, all.n, all.grad_y_stride);
  memory.input(all.s, kBytes, all.m, all.rank, all.rank);
  memory.input(all.grad_s, kBytes, all.m, all.rank, all.rank);
  memory.output(all.grad_a, count * all.rank * all.k * grad_bytes);
  memory.output(all.grad_b, count * all.rank * all.n * grad_bytes);
  memory.workspace(all.partials, config.partials);
  return with_variant(MultiGradsVariants<Element>{}, config.key, [&]<class Kernel>(Kernel) {
    return run_multi<Kernel>("gradients", &multi_lora_grads_kernel<Kernel>, config.blocks, p, memory, all.counters,
                             config.counters);
  });
}

}  // namespace lk

#define CUDA CPU
#define lora_kernels_native lora_kernels_emulated_multi
#define aoti_torch_empty_strided lk::noted_empty_strided
#include "../bind/multi_lora_linear_cuda.cpp"
#undef CUDA
#undef aoti_torch_empty_strided

PYBIND11_MODULE(_emu_multi_lora_linear, m) {
  lk::define_options(m);
  lk::define_device(m);
  m.def("s", [] { return pybind11::bytes(reinterpret_cast<const char*>(lk::last_s.data()), lk::last_s.size()); });
  m.def("launches", [] {
    pybind11::list all;
    for (const lk::MultiLaunch& launch : lk::launches) {
      pybind11::dict d;
      d["name"] = launch.name;
      d["blocks"] = launch.blocks;
      d["counters"] = launch.counters;
      d["counters_were_zero"] = launch.counters_were_zero;
      d["report"] = launch.report;
      all.append(d);
    }
    lk::launches.clear();
    lk::allocations.clear();
    return all;
  });
}
