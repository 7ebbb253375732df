// Host entry points of the CUDA kernels: Params and a stream in, cudaError_t out. No torch.
#pragma once

#include <cuda_runtime_api.h>

#include "../config.h"
#include "../params.h"

namespace lk {

cudaError_t launch_dropout_mask(const DropoutMaskParams& params, cudaStream_t stream);

cudaError_t launch_lora_linear_bf16(const LoraLinearParams& params, const LoraLinearConfig& config,
                                    cudaStream_t stream);
cudaError_t launch_lora_linear_fp16(const LoraLinearParams& params, const LoraLinearConfig& config,
                                    cudaStream_t stream);

}  // namespace lk
