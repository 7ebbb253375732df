// dropout_mask on the CPU.
#include <string>

#include "../cpu/kernels.h"
#include "aten.h"
#include "lora_checks.h"

namespace lk {
namespace {

Tensor dropout_mask(Tensor seed, int64_t rows, int64_t columns, double p, std::string) {
  check_seed(seed);
  const Tensor keep = new_empty_as(seed, {rows, columns}, ScalarType::Bool);
  const DropoutMaskParams params{static_cast<bool*>(keep.mutable_data_ptr()), rows, columns,
                                 static_cast<const int64_t*>(seed.const_data_ptr()), dropout_threshold(p)};
  torch::stable::parallel_for(0, rows, 16,
                              [&](int64_t begin, int64_t end) { cpu::kernels().dropout_mask(params, begin, end); });
  return keep;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CPU, m) { m.impl("dropout_mask", TORCH_BOX(&dropout_mask)); }

}  // namespace lk
