// A CUDA binding over CPU tensors: what the modules of the ops have in common. One include per module.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

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

// Memory that a binding has asked torch for, where a module gives aoti_torch_empty_strided this name.
struct Allocation {
  const char* begin;
  int64_t elements, bytes;

  const char* end() const { return begin + bytes; }
};
inline std::vector<Allocation> allocations;

inline AOTITorchError noted_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                          int32_t device_type, int32_t device, AtenTensorHandle* out) {
  const AOTITorchError error = aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, device, out);
  if (error != AOTI_TORCH_SUCCESS) return error;
  int64_t elements = 1;
  for (int64_t d = 0; d < dim; ++d) elements *= sizes[d];
  void* data;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(*out, &data));
  const auto bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
  allocations.push_back({static_cast<const char*>(data), elements, elements * bytes});
  return error;
}

// A launch may touch what its Params point to, which says nothing of whose memory that is: a workspace is to lie in
// what the call has allocated, the last one that has been where it ends.
inline void check_is_allocated(const void* data, int64_t bytes) {
  if (bytes == 0) return;
  const char* const last = static_cast<const char*>(data) + bytes - 1;
  const auto of = std::find_if(allocations.rbegin(), allocations.rend(),
                               [&](const Allocation& a) { return a.begin <= last && last < a.end(); });
  if (of == allocations.rend() || data < of->begin) throw std::runtime_error("a workspace that nobody has allocated");
}

inline void define_options(pybind11::module_& m) {
  emu::define_report(m);
  m.def("set_options", [](const pybind11::dict& d) { options = emu::options_of(d); });
  m.def("set_stream", [](uintptr_t stream) { emu::runtime.stream = reinterpret_cast<cudaStream_t>(stream); });
}

inline void define_device(pybind11::module_& m) {
  m.def("set_sms", [](int sms) {
    emu::runtime.sms = sms;
    known_limits.forget();
  });
  m.def("set_capability", [](int capability) {
    emu::runtime.capability = capability;
    known_limits.forget();
  });
}

inline void define_launch(pybind11::module_& m) {
  define_options(m);
  m.def("last_launch", [] {
    return pybind11::make_tuple(last.aligned, last.blocks, last.report, reinterpret_cast<uintptr_t>(last.stream));
  });
}

}  // namespace lk
