// frozen_linear and its input gradient on the CPU, by a plain and by a packed weight: the base GEMM of lora_linear
// alone.
#include <string>

#include "cpu_decode.h"
#include "cpu_gemm.h"
#include "lora_checks.h"
#include "packed_rows.h"
#include "packed_weight.h"

namespace lk {
namespace {

Tensor frozen_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, std::string schedule) {
  check_frozen_linear(x, weight, bias);
  if (schedule == "decode") return with_leading_sizes_of(decode_product(as_rows(x), weight, bias), x);
  return base_forward(x, PlainMatrix(weight), bias, schedule);
}

Tensor frozen_linear_backward(Tensor grad_y, Tensor weight, std::string schedule) {
  check_frozen_linear_backward(grad_y, weight);
  return base_backward(grad_y, PlainMatrix(weight), schedule);
}

Tensor linear_packed(Tensor x, std::vector<Tensor> weight, std::string layout, int64_t n, int64_t k, int64_t block,
                     ScalarType dtype, std::optional<Tensor> bias, std::string schedule) {
  check_packed_rows(x, k);
  check_bias(x, n, bias);
  const PackedWeight w = packed_weight_for({weight, layout, n, k, block, dtype}, x.scalar_type());
  if (schedule == "decode" || schedule == "rows") {
    const Tensor y = multiply_packed(as_rows(x), w, bias, nullptr, schedule == "decode");
    return with_leading_sizes_of(cast(y, x.scalar_type()), x);
  }
  return base_forward(x, PackedMatrix(w), bias, schedule);
}

Tensor linear_packed_backward(Tensor grad_y, std::vector<Tensor> weight, std::string layout, int64_t n, int64_t k,
                              int64_t block, ScalarType dtype, std::string schedule) {
  check_packed_rows(grad_y, n);
  return base_backward(
      grad_y, PackedMatrix(packed_weight_for({weight, layout, n, k, block, dtype}, grad_y.scalar_type())), schedule);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CPU, m) {
  m.impl("frozen_linear", TORCH_BOX(&frozen_linear));
  m.impl("frozen_linear_backward", TORCH_BOX(&frozen_linear_backward));
  m.impl("linear_packed", TORCH_BOX(&linear_packed));
  m.impl("linear_packed_backward", TORCH_BOX(&linear_packed_backward));
}

}  // namespace lk
