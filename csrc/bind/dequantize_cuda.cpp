// dequantize on CUDA.
#include <string>
#include <vector>

#include "../launch/dequantize.h"
#include "codes4.h"
#include "cuda_device.h"
#include "rows.h"

namespace lk {
namespace {

Tensor dequantize(std::vector<Tensor> weight, std::string layout, int64_t n, int64_t k, int64_t block, ScalarType dtype,
                  std::string) {
  const Codes4Weight packed = codes4_weight(weight, layout, n, k, block);
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "dtype must be float32, bfloat16 or float16");
  const CudaCall call(weight[0]);
  const Tensor out = new_empty_as(weight[0], {n, k}, dtype);
  const bool aligned = reinterpret_cast<uintptr_t>(packed.data) % kChunkBytes == 0;
  check_cuda(launch_dequantize({.weight = packed, .type = float_type(out), .out = out.mutable_data_ptr()},
                               dequantize_config(packed.count, block, aligned), call.stream),
             "dequantize");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CUDA, m) { m.impl("dequantize", TORCH_BOX(&dequantize)); }

}  // namespace lk
