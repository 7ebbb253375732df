// lora_linear_packed and its gradients on CUDA, for many rows: a slab of the weight at a time is decoded for the
// vendor's GEMM, into memory that all slabs of a call share, in the order of its stream.
#include <algorithm>
#include <string>
#include <vector>

#include "decode.h"
#include "lora_call.h"

namespace lk {
namespace {

class PackedSlabs {
 public:
  PackedSlabs(const Tensor& x, const std::vector<Tensor>& parts, const std::string& layout, int64_t n, int64_t k,
              int64_t block, int64_t length)
      : x_(x), packed_(packed_parts(parts, layout, n, k, block)), n_(n), k_(k), length_(length) {
    STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) == k, "x must be [..., k]");
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

std::tuple<Tensor, Tensor> lora_linear_slabs(Tensor x, std::vector<Tensor> weight, std::string layout, int64_t n,
                                             int64_t k, int64_t block, Tensor lora_A, Tensor lora_B,
                                             std::optional<Tensor> bias, std::optional<Tensor> seed, double scaling,
                                             double dropout_p, int64_t rows) {
  const PackedSlabs slabs(x, weight, layout, n, k, block, rows);
  check_adapter(x, n, k, lora_A, lora_B, seed);
  check_bias(x, n, bias);
  check_type(x);
  const CudaCall call(x);
  const Operands operands(x, slabs.ref(), false, lora_A, lora_B, bias, seed, scaling, dropout_p);
  return lora_forward(x, operands, call, Wanted::kCublas, [&](const Tensor& y) {
    slabs.by_rows(call, [&](const Tensor& slab, int64_t begin, int64_t end) {
      accumulate_product(column_block(y, begin, end), operands.x, transposed(slab));
    });
  });
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_slabs_backward(Tensor grad_y, Tensor x, Tensor s,
                                                              std::vector<Tensor> weight, std::string layout, int64_t n,
                                                              int64_t k, int64_t block, Tensor lora_A, Tensor lora_B,
                                                              std::optional<Tensor> seed, double scaling,
                                                              double dropout_p, bool need_x, bool need_A, bool need_B,
                                                              int64_t columns) {
  const PackedSlabs slabs(x, weight, layout, n, k, block, columns);
  check_adapter(x, n, k, lora_A, lora_B, seed);
  check_gradient(grad_y, x, s, n, lora_A.size(0));
  check_type(x);
  const CudaCall call(x);
  const Tensor gy = matrix_of(grad_y);
  const Operands operands(x, slabs.ref(), false, lora_A, lora_B, std::nullopt, seed, scaling, dropout_p);
  return lora_backward(x, lora_A, gy, s, operands, need_x, need_A, need_B, call, Wanted::kCublas,
                       [&](const Tensor& grad_x) {
                         slabs.by_columns(call, [&](const Tensor& slab, int64_t begin, int64_t end) {
                           accumulate_product(column_block(grad_x, begin, end), gy, slab);
                         });
                       });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CUDA, m) {
  m.impl("lora_linear_slabs", TORCH_BOX(&lora_linear_slabs));
  m.impl("lora_linear_slabs_backward", TORCH_BOX(&lora_linear_slabs_backward));
}

}  // namespace lk
