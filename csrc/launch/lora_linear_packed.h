// lora_linear_packed's launch, for few rows.
#pragma once

#include <vector>

#include "../config/lora_linear_packed.h"
#include "../params/lora_linear_packed.h"
#include "kernel_info.h"

namespace lk {

// type: bf16 or fp16.
cudaError_t launch_lora_linear_packed(const LoraLinearPackedParams& params, FloatType type,
                                      const LoraLinearPackedConfig& config, cudaStream_t stream);
KernelInfo describe_lora_linear_packed(FloatType type, const LoraLinearPackedConfig& config);
std::vector<KernelInfo> lora_linear_packed_kernels();

}  // namespace lk
