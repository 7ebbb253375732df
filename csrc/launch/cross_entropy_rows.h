// cross_entropy_rows's launch.
#pragma once

#include <vector>

#include "../config/cross_entropy_rows.h"
#include "kernel_info.h"

namespace lk {

cudaError_t launch_cross_entropy_rows(const CrossEntropyParams& params, const CrossEntropyConfig& config,
                                      cudaStream_t stream);
KernelInfo describe_cross_entropy_rows(FloatType grad_type, bool aligned);
std::vector<KernelInfo> cross_entropy_rows_kernels();

}  // namespace lk
