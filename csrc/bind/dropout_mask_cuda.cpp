// dropout_mask on CUDA.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <vector>

#include "../launch/dropout_mask.h"
#include "cuda_device.h"
#include "lora_checks.h"

namespace lk {
namespace {

Tensor dropout_mask(Tensor seed, int64_t rows, int64_t columns, double p, std::string) {
  check_seed(seed);
  const CudaCall call(seed);
  const Tensor keep =
      torch::stable::new_empty(seed, std::vector<int64_t>{rows, columns}, torch::headeronly::ScalarType::Bool);
  check_cuda(launch_dropout_mask({static_cast<bool*>(keep.mutable_data_ptr()), rows, columns,
                                  static_cast<const int64_t*>(seed.const_data_ptr()), dropout_threshold(p)},
                                 call.stream),
             "dropout_mask");
  return keep;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CUDA, m) { m.impl("dropout_mask", TORCH_BOX(&dropout_mask)); }

}  // namespace lk
