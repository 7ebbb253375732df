// The emulated kernels as a Python module, for the tests only: numpy arrays in and out, 16-bit elements as uint16.
// Matrices of the dtype "tf32" are float32.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "../kernels/frozen_linear.cuh"
#include "python.h"

namespace py = pybind11;

namespace lk {
namespace {

using Matrix = py::array;  // rows may be strided, elements of a row are neighbours
using Bias = std::optional<py::array>;

// The smallest range that holds the array.
emu::Range range_of(const py::array& a) {
  size_t bytes = a.size() == 0 ? 0 : a.itemsize();
  for (py::ssize_t d = 0; d < a.ndim() && bytes != 0; ++d) bytes += (a.shape(d) - 1) * a.strides(d);
  return {a.data(), bytes};
}

int64_t row_stride(const Matrix& a) { return a.strides(0) / a.itemsize(); }

bool rows_aligned(const py::array& a) {
  return reinterpret_cast<uintptr_t>(a.data()) % kChunkBytes == 0 && a.strides(0) % kChunkBytes == 0 &&
         a.shape(1) % chunk_elements(static_cast<int>(a.itemsize())) == 0;
}

// Of the dtype of `like`.
Matrix poisoned(const Matrix& like, py::ssize_t rows, py::ssize_t columns) {
  Matrix m(like.dtype(), std::vector<py::ssize_t>{rows, columns});
  std::memset(m.mutable_data(), 0xFF, m.nbytes());  // NaN
  return m;
}

// Rows that lie apart, as a caller's may.
Matrix poisoned_and_strided(const Matrix& like, py::ssize_t rows, py::ssize_t columns) {
  const Matrix whole = poisoned(like, rows, columns + 8);
  return Matrix(whole.dtype(), std::vector<py::ssize_t>{rows, columns},
                std::vector<py::ssize_t>{whole.strides(0), whole.strides(1)}, whole.data(), whole);
}

// Whether it is fp32 under 16-bit elements.
bool is_wider(const Matrix& adapter, const Matrix& x) { return adapter.itemsize() > x.itemsize(); }

void* data_of(const Matrix& m) { return const_cast<void*>(m.data()); }

py::array_t<float> workspace(int64_t floats) {
  py::array_t<float> w(floats);
  std::fill_n(w.mutable_data(), w.size(), NAN);
  return w;
}

py::array_t<uint32_t> zeros(int64_t words) {
  py::array_t<uint32_t> w(words);
  std::fill_n(w.mutable_data(), w.size(), 0u);
  return w;
}

// f(Element{}) for the type that `dtype` names.
template <class F>
auto with_element(const std::string& dtype, const F& f) {
  if (dtype == "tf32") return f(TensorFloat32{});
  return dtype == "bf16" ? f(BFloat16{}) : f(Float16{});
}

template <class Variant, class Config, class Params>
emu::Report launch(const Config& config, void (*kernel)(Params), const Params& p, const std::vector<emu::Range>& global,
                   const py::dict& options) {
  return emu::launch(static_cast<int>(config.blocks), Variant::kThreads, Variant::kSharedBytes, global,
                     emu::options_of(options), [&] { kernel(p); });
}

// Returns (y, s, schedule, counters after the launch, report).
py::tuple lora_linear(const std::string& dtype, const Matrix& x, const Matrix& w, const Matrix& a, const Matrix& b,
                      const Bias& bias, double scaling, double dropout_p, std::optional<int64_t> seed, int sms,
                      const py::dict& options) {
  const auto m = x.shape(0), k = x.shape(1), n = w.shape(0), rank = a.shape(0);
  const Matrix y = poisoned_and_strided(x, m, n), s = poisoned(x, m, rank);
  bool aligned = rows_aligned(a) && rows_aligned(b);
  for (const Matrix* t : {&x, &w, &y, &s}) aligned = aligned && rows_aligned(*t);
  const LoraLinearConfig config = lora_linear_config(m, n, k, rank, static_cast<int>(x.itemsize()), aligned,
                                                     seed.has_value(), {.sms = sms, .shared_per_block = 99 << 10});
  auto counters = zeros(config.counters);
  auto partials = workspace(config.partials);
  const Dropout dropout = make_dropout(0, dropout_p);
  const int64_t seed_value = seed.value_or(0);

  const LoraLinearParams p{.x = x.data(),
                           .w = w.data(),
                           .a = a.data(),
                           .b = b.data(),
                           .bias = bias ? bias->data() : nullptr,
                           .y = data_of(y),
                           .s = data_of(s),
                           .x_stride = row_stride(x),
                           .w_stride = row_stride(w),
                           .a_stride = row_stride(a),
                           .b_stride = row_stride(b),
                           .y_stride = row_stride(y),
                           .m = static_cast<int32_t>(m),
                           .n = static_cast<int32_t>(n),
                           .k = static_cast<int32_t>(k),
                           .rank = static_cast<int32_t>(rank),
                           .adapters_are_float = is_wider(a, x),
                           .scaling = static_cast<float>(scaling),
                           .dropout_threshold = dropout.threshold,
                           .dropout_scale = dropout.scale,
                           .seed = seed ? &seed_value : nullptr,
                           .counters = counters.mutable_data(),
                           .group_rows = config.group_rows,
                           .splits = config.splits,
                           .split_depth = config.split_depth,
                           .partials = partials.mutable_data(),
                           .saved_s = nullptr,
                           .partial_grad_b = nullptr};
  std::vector<emu::Range> global = {range_of(counters), range_of(partials), range_of(a), range_of(b)};
  for (const Matrix* t : {&x, &w, &y, &s}) global.push_back(range_of(*t));
  if (bias) global.push_back(range_of(*bias));
  if (seed) global.push_back({&seed_value, sizeof seed_value});

  const emu::Report report = with_element(dtype, [&](auto element) {
    return with_lora_linear_variant<decltype(element)>(config, [&](auto v) {
      return launch<decltype(v)>(config, &lora_linear_kernel<decltype(v)>, p, global, options);
    });
  });
  return py::make_tuple(y, s, name_of(config.schedule), counters, report);
}

// Gradients that are not wanted are empty. Returns (dX, dA, dB, dY B, counters of the two launches, their reports).
py::tuple lora_linear_backward(const std::string& dtype, const Matrix& grad_y, const Matrix& x, const Matrix& s,
                               const Matrix& w, const Matrix& a, const Matrix& b, double scaling, double dropout_p,
                               std::optional<int64_t> seed, bool need_x, bool need_a, bool need_b, int sms,
                               const py::dict& options) {
  const auto m = x.shape(0), k = x.shape(1), n = w.shape(0), rank = a.shape(0);
  const Matrix grad_x = poisoned_and_strided(x, need_x ? m : 0, k), grad_s = poisoned(x, m, rank);
  bool aligned = rows_aligned(a) && rows_aligned(b);
  for (const Matrix* t : {&grad_y, &x, &s, &w}) aligned = aligned && rows_aligned(*t);
  const LoraBackwardConfig config =
      lora_backward_config(m, n, k, rank, aligned, need_x, need_a, need_b, {.sms = sms, .shared_per_block = 99 << 10});
  Matrix grad_a = poisoned(a, need_a ? rank : 0, k), grad_b = poisoned(a, need_b ? n : 0, rank);
  auto counters_x = zeros(config.grad_x.counters), counters = zeros(config.grads.counters);
  auto partial_grad_b = workspace(config.partial_grad_b), partials = workspace(config.grads.partials);
  const Dropout dropout = make_dropout(0, dropout_p);
  const int64_t seed_value = seed.value_or(0);
  std::vector<emu::Range> global = {range_of(a), range_of(b)};
  for (const Matrix* t : {&grad_y, &x, &s, &w, &grad_x, &grad_s}) global.push_back(range_of(*t));
  for (const Matrix* t : {&grad_a, &grad_b}) global.push_back(range_of(*t));
  for (const py::array& t :
       {py::array(counters_x), py::array(counters), py::array(partial_grad_b), py::array(partials)}) {
    global.push_back(range_of(t));
  }
  if (seed) global.push_back({&seed_value, sizeof seed_value});
  float* const parts = config.parts_of_grad_b > 0 ? partial_grad_b.mutable_data() : nullptr;

  const LoraLinearParams p{.x = grad_y.data(),
                           .w = w.data(),
                           .a = b.data(),
                           .b = a.data(),
                           .bias = nullptr,
                           .y = data_of(grad_x),
                           .s = data_of(grad_s),
                           .x_stride = row_stride(grad_y),
                           .w_stride = row_stride(w),
                           .a_stride = row_stride(b),
                           .b_stride = row_stride(a),
                           .y_stride = row_stride(grad_x),
                           .m = static_cast<int32_t>(m),
                           .n = static_cast<int32_t>(need_x ? k : 0),
                           .k = static_cast<int32_t>(n),
                           .rank = static_cast<int32_t>(rank),
                           .adapters_are_float = is_wider(a, x),
                           .scaling = static_cast<float>(scaling),
                           .dropout_threshold = dropout.threshold,
                           .dropout_scale = dropout.scale,
                           .seed = seed ? &seed_value : nullptr,
                           .counters = counters_x.mutable_data(),
                           .group_rows = config.grad_x.group_rows,
                           .splits = 1,
                           .split_depth = 0,
                           .partials = nullptr,
                           .saved_s = s.data(),
                           .partial_grad_b = parts};
  const LoraGradsParams g{.x = x.data(),
                          .grad_y = grad_y.data(),
                          .s = s.data(),
                          .grad_s = grad_s.data(),
                          .grad_a = need_a ? grad_a.mutable_data() : nullptr,
                          .grad_b = need_b ? grad_b.mutable_data() : nullptr,
                          .x_stride = row_stride(x),
                          .grad_y_stride = row_stride(grad_y),
                          .m = static_cast<int32_t>(m),
                          .n = static_cast<int32_t>(n),
                          .k = static_cast<int32_t>(k),
                          .rank = static_cast<int32_t>(rank),
                          .grads_are_float = a.itemsize() == 4,
                          .scaling = static_cast<float>(scaling),
                          .dropout_threshold = dropout.threshold,
                          .dropout_scale = dropout.scale,
                          .seed = seed ? &seed_value : nullptr,
                          .splits = config.grads.splits,
                          .split_rows = config.grads.split_rows,
                          .partials = partials.mutable_data(),
                          .counters = counters.mutable_data(),
                          .partial_grad_b = parts,
                          .parts_of_grad_b = static_cast<int32_t>(config.parts_of_grad_b)};
  const py::tuple reports = with_element(dtype, [&](auto element) {
    const emu::Report first = with_lora_grad_x_variant<decltype(element)>(config.grad_x, [&](auto v) {
      return launch<decltype(v)>(config.grad_x, &lora_linear_kernel<decltype(v)>, p, global, options);
    });
    const emu::Report second = with_lora_grads_variant<decltype(element)>(config.grads, [&](auto v) {
      return launch<decltype(v)>(config.grads, &lora_grads_kernel<decltype(v)>, g, global, options);
    });
    return py::make_tuple(first, second);
  });
  return py::make_tuple(grad_x, grad_a, grad_b, grad_s, py::make_tuple(counters_x, counters), reports);
}

// Returns (y, report).
py::tuple frozen_linear(const std::string& dtype, const Matrix& x, const Matrix& w, const Bias& bias, int sms,
                        const py::dict& options) {
  const auto m = x.shape(0), k = x.shape(1), n = w.shape(0);
  const Matrix y = poisoned_and_strided(x, m, n);
  bool aligned = true;
  for (const Matrix* t : {&x, &w, &y}) aligned = aligned && rows_aligned(*t);
  const LoraLinearConfig config = frozen_linear_config(m, n, aligned, {.sms = sms, .shared_per_block = 99 << 10});
  LoraLinearParams p{};
  p.x = x.data();
  p.w = w.data();
  p.bias = bias ? bias->data() : nullptr;
  p.y = data_of(y);
  p.x_stride = row_stride(x);
  p.w_stride = row_stride(w);
  p.y_stride = row_stride(y);
  p.m = static_cast<int32_t>(m);
  p.n = static_cast<int32_t>(n);
  p.k = static_cast<int32_t>(k);
  p.group_rows = config.group_rows;
  std::vector<emu::Range> global = {range_of(x), range_of(w), range_of(y)};
  if (bias) global.push_back(range_of(*bias));
  const emu::Report report = with_element(dtype, [&](auto element) {
    return with_frozen_linear_variant<decltype(element)>(config, [&](auto v) {
      return launch<decltype(v)>(config, &lora_linear_kernel<decltype(v)>, p, global, options);
    });
  });
  return py::make_tuple(y, report);
}

py::dict config(int64_t m, int64_t n, int64_t k, int64_t rank, bool aligned, bool has_dropout, int sms,
                int shared_per_block, int element_bytes) {
  const LoraLinearConfig c = lora_linear_config(m, n, k, rank, element_bytes, aligned, has_dropout,
                                                {.sms = sms, .shared_per_block = shared_per_block});
  const TileShape tile = tile_shape(c.tile);
  py::dict d;
  d["schedule"] = name_of(c.schedule);
  d["rows"] = tile.rows;
  d["columns"] = tile.columns;
  d["rank_tile"] = c.rank_tile;
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
  d["rows"] = tile_shape(c.grad_x.tile).rows;
  d["rank_tile"] = c.grad_x.rank_tile;
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

}  // namespace
}  // namespace lk

PYBIND11_MODULE(_emu, m) {
  lk::emu::define_report(m);
  m.def("lora_linear", &lk::lora_linear);
  m.def("lora_linear_backward", &lk::lora_linear_backward);
  m.def("frozen_linear", &lk::frozen_linear);
  m.def("lora_linear_config", &lk::config, py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
        py::arg(), py::arg("element_bytes") = 2);
  m.def("lora_backward_config", &lk::backward_config);
  m.def("work_of_ticket", &lk::work);
}
