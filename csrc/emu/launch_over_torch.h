// A CUDA binding over CPU tensors: what its emulated launches have in common. One include per module.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <vector>

#include "../params/prompt_embedding.h"
#include "python.h"
#include "torch_shims.h"

namespace lk {

inline emu::Options options;

// Of the last launch.
struct Launch {
  bool aligned = false;
  int64_t blocks = 0;
  emu::Report report;
};
inline Launch last;

inline size_t size_of(FloatType type) { return type == FloatType::kFloat32 ? 4 : 2; }

// What a launch may touch. Outputs become NaN, -1 or true.
class Memory {
 public:
  // `rows` rows of `columns` elements.
  void input(const void* data, size_t element, int64_t rows, int64_t columns, int64_t stride) {
    if (data != nullptr && rows > 0 && columns > 0) ranges.push_back({data, ((rows - 1) * stride + columns) * element});
  }
  void input(const IndexArray& a, int64_t count) { input(a.data, a.is_int64 ? 8 : 4, 1, count, 0); }
  void output(void* data, size_t bytes) {
    if (data == nullptr || bytes == 0) return;
    std::memset(data, 0xFF, bytes);
    ranges.push_back({data, bytes});
  }
  void column(const TokenColumn& c, int64_t tokens, int64_t rows) {
    input(c.tokens, c.element_size, 1, tokens, 0);
    output(c.out, rows * c.element_size);
  }

  std::vector<emu::Range> ranges;
};

template <class Variant, class Params>
cudaError_t run(void (*kernel)(Params), bool aligned, int64_t blocks, const Params& p, const Memory& memory) {
  last = {.aligned = aligned, .blocks = blocks, .report = {}};
  last.report = emu::launch(static_cast<int>(blocks), Variant::kThreads, Variant::kSharedBytes, memory.ranges, options,
                            [&] { kernel(p); });
  return cudaSuccess;
}

inline void define_launch(pybind11::module_& m) {
  emu::define_report(m);
  m.def("set_options", [](const pybind11::dict& d) { options = emu::options_of(d); });
  m.def("last_launch", [] { return pybind11::make_tuple(last.aligned, last.blocks, last.report); });
}

}  // namespace lk
