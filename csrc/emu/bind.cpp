// The emulated kernels as a Python module, for the tests only: numpy arrays in and out, 16-bit elements as uint16.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../kernels/lora_linear_variants.cuh"

namespace py = pybind11;

namespace lk {
namespace {

using Matrix = py::array_t<uint16_t>;  // rows may be strided, elements of a row are neighbours

// The smallest range that holds the array.
emu::Range range_of(const py::array& a) {
  size_t bytes = a.size() == 0 ? 0 : a.itemsize();
  for (py::ssize_t d = 0; d < a.ndim() && bytes != 0; ++d) bytes += (a.shape(d) - 1) * a.strides(d);
  return {a.data(), bytes};
}

int64_t row_stride(const Matrix& a) { return a.strides(0) / static_cast<py::ssize_t>(sizeof(uint16_t)); }

bool rows_aligned(const Matrix& a) {
  return reinterpret_cast<uintptr_t>(a.data()) % kChunkBytes == 0 && row_stride(a) % kChunkElements == 0 &&
         a.shape(1) % kChunkElements == 0;
}

Matrix poisoned(py::ssize_t rows, py::ssize_t columns) {
  Matrix m({rows, columns});
  std::fill_n(m.mutable_data(), m.size(), uint16_t{0xFFFF});  // NaN
  return m;
}

emu::Options options_of(const py::dict& d) {
  emu::Options o{};
  for (const auto& [key, value] : d) {
    const std::string name = py::str(key);
    if (name == "seed") {
      o.seed = value.cast<uint64_t>();
    } else if (name == "resident_blocks") {
      o.resident_blocks = value.cast<int>();
    } else if (name == "stall_release") {
      o.stall_release = value.cast<bool>();
    } else if (name == "drop_barrier") {
      o.faults.drop_barrier = value.cast<int>();
    } else if (name == "drop_async_wait") {
      o.faults.drop_async_wait = value.cast<int>();
    } else if (name == "drop_acquire") {
      o.faults.drop_acquire = value.cast<bool>();
    } else if (name == "drop_release_order") {
      o.faults.drop_release_order = value.cast<bool>();
    } else {
      throw std::invalid_argument("unknown option " + name);
    }
  }
  return o;
}

template <class Element>
emu::Report launch(const LoraLinearParams& p, const LoraLinearConfig& config, const std::vector<emu::Range>& global,
                   const emu::Options& options) {
  return with_lora_linear_variant<Element>(config, [&](auto variant) {
    using Variant = decltype(variant);
    return emu::launch(static_cast<int>(config.blocks), Variant::kThreads, Variant::kSharedBytes, global, options,
                       [&] { lora_linear_kernel<Variant>(p); });
  });
}

// Returns (y, s, counters after the launch, report).
py::tuple lora_linear(const std::string& dtype, const Matrix& x, const Matrix& w, const Matrix& a, const Matrix& b,
                      const std::optional<py::array_t<uint16_t>>& bias, double scaling, double dropout_p,
                      std::optional<int64_t> seed, int sms, const py::dict& options) {
  const auto m = x.shape(0), k = x.shape(1), n = w.shape(0), rank = a.shape(0);
  const Matrix y_rows = poisoned(m, n + kChunkElements);  // y's rows lie apart, as a caller's may
  const Matrix y({m, n}, {y_rows.strides(0), y_rows.strides(1)}, y_rows.data(), y_rows);
  const Matrix s = poisoned(m, rank);
  bool aligned = true;
  for (const Matrix* t : {&x, &w, &a, &b, &y, &s}) aligned = aligned && rows_aligned(*t);
  const LoraLinearConfig config = lora_linear_config(m, n, rank, aligned, {.sms = sms, .shared_per_block = 99 << 10});
  py::array_t<uint32_t> counters(config.counters);
  std::fill_n(counters.mutable_data(), counters.size(), 0u);
  const Dropout dropout = make_dropout(0, dropout_p);
  const int64_t seed_value = seed.value_or(0);

  const LoraLinearParams p{.x = x.data(),
                           .w = w.data(),
                           .a = a.data(),
                           .b = b.data(),
                           .bias = bias ? bias->data() : nullptr,
                           .y = const_cast<uint16_t*>(y.data()),
                           .s = const_cast<uint16_t*>(s.data()),
                           .x_stride = row_stride(x),
                           .w_stride = row_stride(w),
                           .a_stride = row_stride(a),
                           .b_stride = row_stride(b),
                           .y_stride = row_stride(y),
                           .m = static_cast<int32_t>(m),
                           .n = static_cast<int32_t>(n),
                           .k = static_cast<int32_t>(k),
                           .rank = static_cast<int32_t>(rank),
                           .scaling = static_cast<float>(scaling),
                           .dropout_threshold = dropout.threshold,
                           .dropout_scale = dropout.scale,
                           .seed = seed ? &seed_value : nullptr,
                           .counters = counters.mutable_data(),
                           .group_rows = config.group_rows};
  std::vector<emu::Range> global;
  for (const Matrix* t : {&x, &w, &a, &b, &y, &s}) global.push_back(range_of(*t));
  global.push_back(range_of(counters));
  if (bias) global.push_back(range_of(*bias));
  if (seed) global.push_back({&seed_value, sizeof seed_value});

  const auto run = dtype == "bf16" ? launch<BFloat16> : launch<Float16>;
  const emu::Report report = run(p, config, global, options_of(options));
  return py::make_tuple(y, s, counters, report);
}

py::dict config(int64_t m, int64_t n, int64_t rank, bool aligned, int sms, int shared_per_block) {
  const LoraLinearConfig c =
      lora_linear_config(m, n, rank, aligned, {.sms = sms, .shared_per_block = shared_per_block});
  const TileShape tile = tile_shape(c.tile);
  py::dict d;
  d["rows"] = tile.rows;
  d["columns"] = tile.columns;
  d["rank_tile"] = c.rank_tile;
  d["blocks"] = c.blocks;
  d["group_rows"] = c.group_rows;
  d["counters"] = c.counters;
  d["reason"] = c.reason;
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
  py::class_<lk::emu::Report>(m, "Report")
      .def_readonly("multiply_adds", &lk::emu::Report::mma)
      .def_readonly("barrier_sites", &lk::emu::Report::barrier_sites)
      .def_readonly("async_wait_sites", &lk::emu::Report::async_wait_sites);
  m.def("lora_linear", &lk::lora_linear);
  m.def("lora_linear_config", &lk::config);
  m.def("work_of_ticket", &lk::work);
}
