// Host entry points of the CUDA kernels: Params and a stream in, cudaError_t out. No torch.
#pragma once

#include <cuda_runtime_api.h>

#include "../params.h"

namespace lk {

cudaError_t launch_dropout_mask(const DropoutMaskParams& params, cudaStream_t stream);

}  // namespace lk
