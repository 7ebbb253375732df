// A CUDA binding over CPU tensors: what the modules of the ops have in common. One include per module.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "launches.h"
#include "python.h"
#include "torch_shims.h"

namespace lk {

// Of the last launch.
struct Launch {
  bool aligned = false;
  int64_t blocks = 0;
  cudaStream_t stream = nullptr;
  emu::Report report;
};
inline Launch last;

template <class Variant, class Params>
cudaError_t run(void (*kernel)(Params), bool aligned, int64_t blocks, const Params& p, const Memory& memory,
                cudaStream_t stream) {
  last = {.aligned = aligned, .blocks = blocks, .stream = stream, .report = {}};
  last.report = emulate<Variant>(kernel, blocks, p, memory);
  return cudaSuccess;
}

inline void define_options(pybind11::module_& m) {
  emu::define_report(m);
  m.def("set_options", [](const pybind11::dict& d) { options = emu::options_of(d); });
  m.def("set_stream", [](uintptr_t stream) { emu::runtime.stream = reinterpret_cast<cudaStream_t>(stream); });
}

inline void define_launch(pybind11::module_& m) {
  define_options(m);
  m.def("last_launch", [] {
    return pybind11::make_tuple(last.aligned, last.blocks, last.report, reinterpret_cast<uintptr_t>(last.stream));
  });
}

}  // namespace lk
