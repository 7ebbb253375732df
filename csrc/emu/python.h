// What the tests say to the emulator, and it to them.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <variant>

#include "machine.h"

namespace lk::emu {

inline Options options_of(const pybind11::dict& d) {
  Options o{};
  Faults& f = o.faults;
  const std::map<std::string, std::variant<uint64_t*, int*, bool*>> known = {
      {"seed", &o.seed},
      {"resident_blocks", &o.resident_blocks},
      {"stall_release", &o.stall_release},
      {"drop_barrier", &f.drop_barrier},
      {"drop_async_wait", &f.drop_async_wait},
      {"drop_global_store", &f.drop_global_store},
      {"early_release", &f.early_release},
      {"ignore_copy_size", &f.ignore_copy_size},
      {"drop_acquire", &f.drop_acquire},
      {"drop_release_order", &f.drop_release_order},
      {"drop_arrival", &f.drop_arrival},
      {"drop_barrier_wait", &f.drop_barrier_wait},
      {"drop_proxy_fence", &f.drop_proxy_fence},
      {"drop_multiply_wait", &f.drop_multiply_wait},
      {"drop_multiply_fence", &f.drop_multiply_fence},
      {"drop_store_wait", &f.drop_store_wait},
      {"ignore_expected_bytes", &f.ignore_expected_bytes},
  };
  for (const auto& [key, value] : d) {
    const auto option = known.find(pybind11::str(key));
    if (option == known.end()) throw std::invalid_argument("unknown option " + std::string(pybind11::str(key)));
    std::visit([&](auto* target) { *target = value.cast<std::remove_pointer_t<decltype(target)>>(); }, option->second);
  }
  return o;
}

// Module-local: more than one module has it.
inline void define_report(pybind11::module_& m) {
  pybind11::class_<Report>(m, "Report", pybind11::module_local())
      .def_readonly("multiply_adds", &Report::mma)
      .def_readonly("groups_under_way", &Report::groups_under_way)
      .def_readonly("load_matrix_turns", &Report::load_matrix_turns)
      .def_readonly("barrier_sites", &Report::barrier_sites)
      .def_readonly("async_wait_sites", &Report::async_wait_sites)
      .def_readonly("global_store_sites", &Report::global_store_sites)
      .def_readonly("arrival_sites", &Report::arrival_sites)
      .def_readonly("barrier_wait_sites", &Report::barrier_wait_sites)
      .def_readonly("proxy_fence_sites", &Report::proxy_fence_sites)
      .def_readonly("multiply_wait_sites", &Report::multiply_wait_sites)
      .def_readonly("multiply_fence_sites", &Report::multiply_fence_sites)
      .def_readonly("store_wait_sites", &Report::store_wait_sites)
      .def_readonly("warpgroup_multiply_adds", &Report::multiply_adds)
      .def_readonly("bytes_read", &Report::bytes_read)
      .def_readonly("bytes_loaded", &Report::bytes_loaded)
      .def_readonly("bytes_stored", &Report::bytes_stored);
}

}  // namespace lk::emu
