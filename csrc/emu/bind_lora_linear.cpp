// The CUDA binding of lora_linear as it is, over CPU tensors and emulated launches: ops of `lora_kernels_emulated`.
// Also the frozen product's kernel, and what the config says. Test only.
#include "../kernels/frozen_linear.cuh"
#include "launch_over_torch.h"
#include "lora_linear_launches.h"

#define CUDA CPU
#define lora_kernels_native lora_kernels_emulated
#include "../bind/lora_linear_cuda.cpp"

namespace lk {
namespace {

namespace py = pybind11;

Tensor frozen_linear(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  check_frozen_linear(x, weight, bias);
  const MatrixRef rows = ref_of(x), w = ref_of(weight);
  const int64_t m = rows.rows, k = rows.columns, n = w.rows;
  const Tensor y = new_empty_as(x, {m, n});
  const bool aligned = whole_chunks(n, k, 0, element_bytes(rows.type)) && rows.aligned() && w.aligned();
  const LoraLinearConfig config = frozen_linear_config(m, n, aligned, device_limits(0));
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

py::dict config(int64_t m, int64_t n, int64_t k, int64_t rank, bool aligned, bool has_dropout, int sms,
                int shared_per_block, int element_bytes) {
  const LoraLinearConfig c = lora_linear_config(m, n, k, rank, element_bytes, aligned, has_dropout,
                                                {.sms = sms, .shared_per_block = shared_per_block});
  const TileShape tile = tile_shape(c.key.tile);
  py::dict d;
  d["schedule"] = name_of(c.key.schedule);
  d["rows"] = tile.rows;
  d["columns"] = tile.columns;
  d["stages"] = tile.stages;
  d["rank_tile"] = c.key.rank_tile;
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

py::dict backward_config(int64_t m, int64_t n, int64_t k, int64_t rank, bool aligned, bool need_x, bool need_a,
                         bool need_b, int sms, int shared_per_block) {
  const LoraBackwardConfig c = lora_backward_config(m, n, k, rank, aligned, need_x, need_a, need_b,
                                                    {.sms = sms, .shared_per_block = shared_per_block});
  py::dict d;
  d["rows"] = tile_shape(c.grad_x.key.tile).rows;
  d["stages"] = tile_shape(c.grad_x.key.tile).stages;
  d["rank_tile"] = c.grad_x.key.rank_tile;
  d["blocks"] = c.grad_x.blocks;
  d["parts_of_grad_b"] = c.parts_of_grad_b;
  d["grads_blocks"] = c.grads.blocks;
  d["splits"] = c.grads.splits;
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
  d["aligned"] = launch.aligned;
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

PYBIND11_MODULE(_emu_lora_linear, m) {
  using lk::emu::runtime;
  lk::define_options(m);
  m.def("set_sms", [](int sms) {
    runtime.sms = sms;
    lk::known_limits.forget();
  });
  m.def("set_row_gap", [](int64_t elements) { lk::row_gap = elements; });
  m.def("fail_launches", [](bool on) { runtime.fail_launches = on; });
  m.def("memsets", [] { return runtime.memsets; });
  m.def("memset_stream", [] { return reinterpret_cast<uintptr_t>(runtime.memset_stream); });
  // Of the last forward or backward.
  m.def("launches", [] {
    pybind11::list all;
    for (const lk::LoraLaunch& launch : lk::lora_launches) all.append(lk::to_python(launch));
    return all;
  });
  m.def("grad_s",
        [] { return pybind11::bytes(reinterpret_cast<const char*>(lk::last_grad_s.data()), lk::last_grad_s.size()); });
  m.def("lora_linear_config", &lk::config, pybind11::arg(), pybind11::arg(), pybind11::arg(), pybind11::arg(),
        pybind11::arg(), pybind11::arg(), pybind11::arg(), pybind11::arg(), pybind11::arg("element_bytes") = 2);
  m.def("lora_backward_config", &lk::backward_config);
  m.def("work_of_ticket", &lk::work);
}
