// Host entry points of the CUDA kernels: Params and a stream in, cudaError_t out. No torch. Each has a twin that says
// which kernel it would launch.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "../config.h"
#include "../params.h"

namespace lk {

struct KernelInfo {
  std::string name;  // mangled
  int threads;
  int shared_bytes;  // dynamic
};

cudaError_t launch_dropout_mask(const DropoutMaskParams& params, cudaStream_t stream);
KernelInfo describe_dropout_mask();

cudaError_t launch_lora_linear_bf16(const LoraLinearParams& params, const LoraLinearConfig& config,
                                    cudaStream_t stream);
cudaError_t launch_lora_linear_fp16(const LoraLinearParams& params, const LoraLinearConfig& config,
                                    cudaStream_t stream);
KernelInfo describe_lora_linear_bf16(const LoraLinearConfig& config);
KernelInfo describe_lora_linear_fp16(const LoraLinearConfig& config);

}  // namespace lk
