// dequantize on CUDA.
#include <string>
#include <vector>

#include "decode.h"

namespace lk {
namespace {

Tensor dequantize(std::vector<Tensor> weight, std::string layout, int64_t n, int64_t k, int64_t block, ScalarType dtype,
                  std::string) {
  const PackedParts packed = packed_parts(weight, layout, n, k, block);
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "dequantize: dtype must be float32, bfloat16 or float16");
  const CudaCall call(weight[0]);
  const Tensor out = new_empty_as(weight[0], {n, k}, dtype);
  decode(packed, rows_of(packed, 0, n), out, call.stream);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CUDA, m) { m.impl("dequantize", TORCH_BOX(&dequantize)); }

}  // namespace lk
