// lora_linear_packed and linear_packed and their gradients on CUDA, for many rows: slab by slab.
#include "lora_call.h"
#include "packed_slabs.h"

namespace lk {
namespace {

std::tuple<Tensor, Tensor> lora_linear_slabs(Tensor x, std::vector<Tensor> weight, std::string layout, int64_t n,
                                             int64_t k, int64_t block, Tensor lora_A, Tensor lora_B,
                                             std::optional<Tensor> bias, std::optional<Tensor> seed, double scaling,
                                             double dropout_p, int64_t rows) {
  const PackedSlabs slabs(x, weight, layout, n, k, block, rows);
  check_adapter(x, n, k, lora_A, lora_B, seed);
  check_bias(x, n, bias);
  check_type(x, "lora_linear_slabs");
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
  check_type(x, "lora_linear_slabs_backward");
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

// Frozen: y = x wT + bias.
Tensor linear_slabs(Tensor x, std::vector<Tensor> weight, std::string layout, int64_t n, int64_t k, int64_t block,
                    std::optional<Tensor> bias, int64_t rows) {
  const PackedSlabs slabs(x, weight, layout, n, k, block, rows);
  check_bias(x, n, bias);
  check_type(x, "linear_slabs");
  const CudaCall call(x);
  const Tensor matrix = matrix_of(x);
  const std::optional<Tensor> addend = contiguous(bias);
  const Tensor y = new_empty_as(x, {matrix.size(0), n});
  slabs.by_rows(call, [&](const Tensor& slab, int64_t begin, int64_t end) {
    product(column_block(y, begin, end), matrix, transposed(slab), addend, begin);
  });
  return with_leading_sizes_of(y, x);
}

// Its dX. grad_y: [..., n].
Tensor linear_slabs_backward(Tensor grad_y, std::vector<Tensor> weight, std::string layout, int64_t n, int64_t k,
                             int64_t block, int64_t columns) {
  const PackedSlabs slabs(grad_y, weight, layout, n, k, block, columns, n);
  check_type(grad_y, "linear_slabs_backward");
  const CudaCall call(grad_y);
  const Tensor gy = matrix_of(grad_y), grad_x = new_empty_as(grad_y, {gy.size(0), k});
  slabs.by_columns(call, [&](const Tensor& slab, int64_t begin, int64_t end) {
    product(column_block(grad_x, begin, end), gy, slab);
  });
  return with_leading_sizes_of(grad_x, grad_y);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CUDA, m) {
  m.impl("lora_linear_slabs", TORCH_BOX(&lora_linear_slabs));
  m.impl("lora_linear_slabs_backward", TORCH_BOX(&lora_linear_slabs_backward));
  m.impl("linear_slabs", TORCH_BOX(&linear_slabs));
  m.impl("linear_slabs_backward", TORCH_BOX(&linear_slabs_backward));
}

}  // namespace lk
