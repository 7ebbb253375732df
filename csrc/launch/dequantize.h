// dequantize's launch.
#pragma once

#include <vector>

#include "../config/dequantize.h"
#include "../params/dequantize.h"
#include "kernel_info.h"

namespace lk {

cudaError_t launch_dequantize(const DequantizeParams& params, const DequantizeConfig& config, cudaStream_t stream);
KernelInfo describe_dequantize(FloatType type, bool aligned);
std::vector<KernelInfo> dequantize_kernels();

}  // namespace lk
