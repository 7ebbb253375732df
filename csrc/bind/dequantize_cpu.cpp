// dequantize on the CPU.
#include <string>

#include "packed_weight.h"

namespace lk {
namespace {

Tensor dequantize(std::vector<Tensor> weight, std::string layout, int64_t n, int64_t k, int64_t block, ScalarType dtype,
                  std::string) {
  const PackedWeight w = packed_weight({weight, layout, n, k, block, dtype});
  const Tensor out = new_empty_as(weight[0], {n, k}, dtype);
  unpack_rows(w, out.mutable_data_ptr(), dtype != ScalarType::Float, 0, n);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CPU, m) { m.impl("dequantize", TORCH_BOX(&dequantize)); }

}  // namespace lk
