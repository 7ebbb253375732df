// What the tests say to the emulator, and it to them.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "machine.h"

namespace lk::emu {

inline Options options_of(const pybind11::dict& d) {
  Options o{};
  for (const auto& [key, value] : d) {
    const std::string name = pybind11::str(key);
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
    } else if (name == "drop_global_store") {
      o.faults.drop_global_store = value.cast<int>();
    } else if (name == "early_release") {
      o.faults.early_release = value.cast<bool>();
    } else if (name == "ignore_copy_size") {
      o.faults.ignore_copy_size = value.cast<bool>();
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

// Module-local: more than one module has it.
inline void define_report(pybind11::module_& m) {
  pybind11::class_<Report>(m, "Report", pybind11::module_local())
      .def_readonly("multiply_adds", &Report::mma)
      .def_readonly("groups_under_way", &Report::groups_under_way)
      .def_readonly("load_matrix_turns", &Report::load_matrix_turns)
      .def_readonly("barrier_sites", &Report::barrier_sites)
      .def_readonly("async_wait_sites", &Report::async_wait_sites)
      .def_readonly("global_store_sites", &Report::global_store_sites);
}

}  // namespace lk::emu
