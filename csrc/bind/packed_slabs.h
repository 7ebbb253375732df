// A packed weight on CUDA that is decoded a slab at a time, into memory that all slabs of a call share, in the order of
// its stream.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../launch/lora_problem.h"
#include "decode.h"

namespace lk {

class PackedSlabs {
 public:
  PackedSlabs(const Tensor& x, const std::vector<Tensor>& parts, const std::string& layout, int64_t n, int64_t k,
              int64_t block, int64_t length, std::optional<int64_t> columns_of_x = {})
      : x_(x), packed_(packed_parts(parts, layout, n, k, block)), n_(n), k_(k), length_(length) {
    STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) == columns_of_x.value_or(k), "x must be [..., k]");
    STD_TORCH_CHECK(is_beside(x, parts[0]), "weight must be on x's device");
    STD_TORCH_CHECK(length > 0, "a slab must have at least one row or column");
  }

  // What stands for the weight where only its sizes are asked for.
  MatrixRef ref() const { return {nullptr, k_, n_, k_, float_type(x_)}; }

  // f(slab, begin, end) for rows of the weight, of which a slab has `length`.
  template <class F>
  void by_rows(const CudaCall& call, const F& f) const {
    by(
        call, n_, k_, [&](int64_t begin, int64_t end) { return rows_of(packed_, begin, end); },
        [&](const Tensor& memory, int64_t count) { return view2d(memory, {count, k_}, {k_, 1}); }, f);
  }

  // For columns. Rows would each add to all of dX, which rounds every sum.
  template <class F>
  void by_columns(const CudaCall& call, const F& f) const {
    by(
        call, k_, n_, [&](int64_t begin, int64_t end) { return columns_of(packed_, begin, end); },
        [&](const Tensor& memory, int64_t count) { return view2d(memory, {n_, count}, {count, 1}); }, f);
  }

 private:
  template <class Runs, class View, class F>
  void by(const CudaCall& call, int64_t size, int64_t other, const Runs& runs, const View& view, const F& f) const {
    const Tensor memory = new_empty_as(x_, {std::min(length_, size) * other});
    for (int64_t begin = 0; begin < size; begin += length_) {
      const int64_t end = std::min(begin + length_, size);
      const Tensor slab = view(memory, end - begin);
      decode(packed_, runs(begin, end), slab, call.stream);
      f(slab, begin, end);
    }
  }

  const Tensor& x_;
  const PackedParts packed_;
  const int64_t n_, k_, length_;
};

}  // namespace lk
