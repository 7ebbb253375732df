// The steps of the tour as a Python module: their launches on the host emulator. Compiled by run.py.
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "emu/python.h"
#include "step1_naive.cuh"
#include "step5_warp_specialised.cuh"

namespace lk::tour {
namespace {

namespace py = pybind11;

// Steps 4 and 5 are checked by a clock per thread, which knows barriers in memory and engines (emu/async.h).
emu::Options options_of(int step, const py::dict& options) {
  emu::Options o = emu::options_of(options);
  o.by_clocks = step >= 4;
  return o;
}

class Launches {
 public:
  // arrays: by their names in Problem, of 16-bit elements, row by row without gaps; nothing else may be touched.
  Launches(const py::dict& arrays, float scaling, const emu::Options& options) : options_(options) {
    const auto array = [&](const char* name) {
      py::buffer_info info = py::cast<py::buffer>(arrays[name]).request();
      ranges_.push_back({info.ptr, static_cast<size_t>(info.size * info.itemsize)});
      return info;
    };
    const auto elements = [&](const char* name) { return static_cast<uint16_t*>(array(name).ptr); };
    const auto x = array("x"), w = array("w"), a = array("a");
    p_ = {.x = static_cast<uint16_t*>(x.ptr),
          .w = static_cast<uint16_t*>(w.ptr),
          .a = static_cast<uint16_t*>(a.ptr),
          .b = elements("b"),
          .bias = elements("bias"),
          .s = elements("s"),
          .y = elements("y"),
          .counters = static_cast<uint32_t*>(array("counters").ptr),
          .m = static_cast<int>(x.shape[0]),
          .n = static_cast<int>(w.shape[0]),
          .k = static_cast<int>(x.shape[1]),
          .rank = static_cast<int>(a.shape[0]),
          .scaling = scaling};
  }

  // persistent_blocks: of step 5, whose grid is the number of SMs.
  std::vector<emu::Report> run(int step, int persistent_blocks) {
    const int rows = ceil_div(p_.m, kM), tiles_of_y = rows * ceil_div(p_.n, kTileN);
    if (step == 1) {
      launch(ceil_div(p_.m * p_.rank, kNaiveThreads), kNaiveThreads, 0, [&] { step1_s(p_); });
      launch(ceil_div(p_.m * p_.n, kNaiveThreads), kNaiveThreads, 0, [&] { step1_y(p_); });
    } else if (step == 2) {
      launch(tiles_of_s(p_), kThreads, Tiled<kRankTile>::kSharedBytes, [&] { step2_s(p_); });
      launch(tiles_of_y, kThreads, Tiled<kTileN>::kSharedBytes, [&] { step2_y(p_); });
    } else if (step == 3) {
      launch(tiles_of_s(p_) + tiles_of_y, kThreads, kTicketedSharedBytes, [&] { step3(p_); });
    } else if (step == 4) {
      const Maps maps = maps_of(kTileN);
      launch(tiles_of_s(p_) + tiles_of_y, kThreads, kRingSharedBytes, [&] { step4(p_, maps); });
    } else {
      const Maps maps = maps_of(Specialised::kWideN);
      launch(persistent_blocks, Specialised::kThreads, Specialised::kSharedBytes, [&] { step5(p_, maps); });
    }
    return std::move(reports_);
  }

 private:
  template <class Kernel>
  void launch(int blocks, int threads, int shared_bytes, const Kernel& kernel) {
    reports_.push_back(emu::launch(blocks, threads, shared_bytes, ranges_, options_, kernel));
  }

  Maps maps_of(int tile_n) const {
    const auto map = [](const uint16_t* data, int rows, int columns, int box_rows) {
      return emu::encoded({.data = reinterpret_cast<uint64_t>(data),
                           .rows = static_cast<uint64_t>(rows),
                           .columns = static_cast<uint64_t>(columns),
                           .stride_bytes = static_cast<uint64_t>(columns) * sizeof(uint16_t),
                           .box_rows = box_rows,
                           .box_columns = kDepth,
                           .swizzle_bytes = kDepth * 2});
    };
    return {.x = map(p_.x, p_.m, p_.k, kM),
            .w = map(p_.w, p_.n, p_.k, tile_n),
            .a = map(p_.a, p_.rank, p_.k, kRankTile),
            .s = map(p_.s, p_.m, p_.rank, kM),
            .b = map(p_.b, p_.n, p_.rank, tile_n)};
  }

  Problem p_;
  emu::Options options_;
  std::vector<emu::Range> ranges_;
  std::vector<emu::Report> reports_;
};

}  // namespace
}  // namespace lk::tour

PYBIND11_MODULE(_tour, m) {
  using namespace lk::tour;
  lk::emu::define_report(m);
  m.def("run", [](int step, const py::dict& arrays, float scaling, int persistent_blocks, const py::dict& options) {
    return Launches(arrays, scaling, options_of(step, options)).run(step, persistent_blocks);
  });
  m.attr("THREADS") = py::make_tuple(kNaiveThreads, kThreads, kThreads, kThreads, Specialised::kThreads);
  m.attr("SHARED_BYTES") =
      py::make_tuple(0, Tiled<kTileN>::kSharedBytes, kTicketedSharedBytes, kRingSharedBytes, Specialised::kSharedBytes);
}
