// The CUDA bindings of lora_linear, also by slabs, as they are, over CPU tensors and emulated launches: ops of
// `lora_kernels_emulated`. Also the frozen product's kernel, and what the config says. Test only.
#define LK_NO_WGMMA  // bind_lora_linear_wgmma.cpp has it
#include "../kernels/frozen_linear.cuh"
#include "dequantize_launch.h"
#include "lora_linear_launches.h"

#define CUDA CPU
#define lora_kernels_native lora_kernels_emulated
#define aoti_torch_empty_strided lk::noted_empty_strided
#include "../bind/lora_linear_cuda.cpp"
#include "../bind/lora_linear_slabs_cuda.cpp"

namespace lk {
namespace {

namespace py = pybind11;

Tensor frozen_linear(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  check_frozen_linear(x, weight, bias);
  const MatrixRef rows = ref_of(x), w = ref_of(weight);
  const int64_t m = rows.rows, k = rows.columns, n = w.rows;
  const Tensor y = new_empty_as(x, {m, n});
  const LoraLinearConfig config = frozen_linear_config(m, n, device_limits(0));
  LoraLinearParams p{};
  p.x = rows.data;
  p.w = w.data;
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  p.x_stride = rows.stride;
  p.w_stride = w.stride;
  p.y_stride = n;
  p.m = static_cast<int32_t>(m);
  p.n = static_cast<int32_t>(n);
  p.k = static_cast<int32_t>(k);
  p.group_rows = config.group_rows;
  with_element(rows.type, [&]<class Element>(std::type_identity<Element>) {
    return with_variant(FrozenVariants<Element>{}, config.key,
                        [&]<class Kernel>(Kernel) { return run_lora_linear<Kernel>(p, config, emu::runtime.stream); });
  });
  return y;
}

FloatType type_of(int element_bytes) { return element_bytes == 4 ? FloatType::kFloat32 : FloatType::kBFloat16; }

// A problem by its sizes; unaligned: its rows begin between chunks.
LoraProblem problem_of(int64_t m, int64_t n, int64_t k, int64_t rank, bool aligned, bool has_dropout, FloatType type) {
  static constexpr int64_t kSeed = 0;
  const void* const somewhere = reinterpret_cast<const void*>(static_cast<uintptr_t>(aligned ? 0 : 2));
  const auto matrix = [&](int64_t rows, int64_t columns) { return MatrixRef{somewhere, columns, rows, columns, type}; };
  return {.x = matrix(m, k),
          .w = matrix(n, k),
          .a = matrix(rank, k),
          .b = matrix(n, rank),
          .seed = has_dropout ? &kSeed : nullptr};
}

py::dict to_python(const LoraLinearConfig& c) {
  const TileShape tile = tile_shape(c.key.tile);
  py::dict d;
  d["schedule"] = name_of(c.key.schedule);
  d["access"] = name_of(c.key.access);
  d["rows"] = tile.rows;
  d["columns"] = tile.columns;
  d["stages"] = tile.stages;
  d["rank_tile"] = c.key.rank_tile;
  d["cluster"] = c.key.cluster;
  d["blocks"] = c.blocks;
  d["group_rows"] = c.group_rows;
  d["counters"] = c.counters;
  d["splits"] = c.splits;
  d["split_depth"] = c.split_depth;
  d["partials"] = c.partials;
  d["reason"] = c.reason;
  d["tile_reason"] = c.tile_reason;
  return d;
}

// The first launch of a forward, and whether the vendor's GEMM is used.
py::dict config(int64_t m, int64_t n, int64_t k, int64_t rank, bool aligned, bool has_dropout, int sms,
                int shared_per_block, int element_bytes, int capability, const std::string& schedule) {
  const DeviceLimits device{.sms = sms, .shared_per_block = shared_per_block, .capability = capability};
  const LoraForwardConfig c = lora_forward_config(
      problem_of(m, n, k, rank, aligned, has_dropout, type_of(element_bytes)), device, wanted(schedule));
  py::dict d = to_python(c.vendor_makes_s ? c.expand : c.launch);
  d["cublas"] = c.cublas.yes;
  d["why"] = c.cublas.reason;
  return d;
}

py::dict backward_config(int64_t m, int64_t n, int64_t k, int64_t rank, bool aligned, bool need_x, bool need_a,
                         bool need_b, int sms, int shared_per_block, int element_bytes, int capability,
                         const std::string& schedule) {
  const LoraProblem forward = problem_of(m, n, k, rank, aligned, false, type_of(element_bytes));
  const LoraBackwardProblem problem{.forward = forward,
                                    .grad_y = {forward.x.data, n, m, n, forward.x.type},
                                    .s = {forward.x.data, rank, m, rank, forward.x.type},
                                    .need_x = need_x,
                                    .need_a = need_a,
                                    .need_b = need_b};
  const DeviceLimits device{.sms = sms, .shared_per_block = shared_per_block, .capability = capability};
  const LoraBackwardConfig c = lora_backward_config(problem, device, wanted(schedule));
  py::dict d = to_python(c.expand.blocks > 0 ? c.expand : c.grad_x);
  d["cublas"] = c.cublas.yes;
  d["why"] = c.cublas.reason;
  d["parts_of_grad_b"] = c.parts_of_grad_b;
  d["grads_blocks"] = c.grads.blocks;
  d["grads_splits"] = c.grads.splits;
  d["split_rows"] = c.grads.split_rows;
  return d;
}

// (is_shrink, row, column) of a ticket.
py::tuple work(int ticket, int row_blocks, int shrink_columns, int base_columns, int group_rows) {
  const WorkItem item = work_of_ticket(ticket, row_blocks, shrink_columns, base_columns, group_rows);
  return py::make_tuple(item.is_shrink, item.row, item.column);
}

py::dict to_python(const LoraLaunch& launch) {
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  py::dict d;
  d["schedule"] = launch.schedule;
  d["access"] = name_of(launch.access);
  d["x"] = address(launch.x);
  d["weight"] = address(launch.w);
  d["lora_A"] = address(launch.a);
  d["lora_B"] = address(launch.b);
  d["counters"] = address(launch.counters);
  d["counters_were_zero"] = launch.counters_were_zero;
  d["stream"] = address(launch.stream);
  d["report"] = launch.report;
  return d;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_emulated, CPU, m) { m.impl("frozen_linear", TORCH_BOX(&frozen_linear)); }

// Where some of the tensors are on another device than the others.
STABLE_TORCH_LIBRARY_IMPL(lora_kernels_emulated, Meta, m) {
  m.impl("lora_linear", TORCH_BOX(&lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward));
}

}  // namespace lk

#undef CUDA
#undef aoti_torch_empty_strided

PYBIND11_MODULE(_emu_lora_linear, m) {
  using lk::emu::runtime;
  lk::define_options(m);
  lk::define_device(m);
  // SMs of a device that has this many, unless it is known.
  m.def("limits_of", [](int device, int sms) {
    runtime.sms = sms;
    return lk::device_limits(device).sms;
  });
  m.def("set_row_gap", [](int64_t elements) { lk::row_gap = elements; });
  m.def("fail_launches", [](bool on) { runtime.fail_launches = on; });
  m.def("memsets", [] { return runtime.memsets; });
  m.def("memset_stream", [] { return reinterpret_cast<uintptr_t>(runtime.memset_stream); });
  // Since this was last called.
  m.def("launches", [] {
    pybind11::list all;
    for (const lk::LoraLaunch& launch : lk::lora_launches) all.append(lk::to_python(launch));
    lk::lora_launches.clear();
    return all;
  });
  // Elements of each, since this was last called.
  m.def("allocations", [] {
    std::vector<int64_t> elements;
    for (const lk::Allocation& a : std::exchange(lk::allocations, {})) elements.push_back(a.elements);
    return elements;
  });
  // (stream, first, count, length) of what dequantize has decoded since this was last called.
  m.def("decoded", [] {
    pybind11::list all;
    for (const auto& [runs, stream] : lk::decoded_runs)
      all.append(pybind11::make_tuple(reinterpret_cast<uintptr_t>(stream), runs.first, runs.count, runs.length));
    lk::decoded_runs.clear();
    return all;
  });
  m.def("grad_s",
        [] { return pybind11::bytes(reinterpret_cast<const char*>(lk::last_grad_s.data()), lk::last_grad_s.size()); });
  using pybind11::arg;
  m.def("lora_linear_config", &lk::config, arg("m"), arg("n"), arg("k"), arg("rank"), arg("aligned"),
        arg("has_dropout"), arg("sms"), arg("shared_per_block"), arg("element_bytes") = 2, arg("capability") = 86,
        arg("schedule") = "auto");
  m.def("lora_backward_config", &lk::backward_config, arg("m"), arg("n"), arg("k"), arg("rank"), arg("aligned"),
        arg("need_x"), arg("need_a"), arg("need_b"), arg("sms"), arg("shared_per_block"), arg("element_bytes") = 2,
        arg("capability") = 86, arg("schedule") = "auto");
  m.def("work_of_ticket", &lk::work);
}
