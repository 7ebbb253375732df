// prefix_kv's launch, and its gradient's.
#pragma once

#include <vector>

#include "../config/prefix_kv.h"
#include "kernel_info.h"

namespace lk {

cudaError_t launch_prefix_kv(const PrefixKvParams& params, const PrefixConfig& config, cudaStream_t stream);
cudaError_t launch_prefix_kv_backward(const PrefixKvBackwardParams& params, const PrefixConfig& config,
                                      cudaStream_t stream);
KernelInfo describe_prefix_kv(FloatType type, bool aligned);
KernelInfo describe_prefix_kv_backward(FloatType type, bool aligned);
std::vector<KernelInfo> prefix_kv_kernels();

}  // namespace lk
