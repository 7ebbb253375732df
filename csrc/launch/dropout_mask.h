// dropout_mask's launch.
#pragma once

#include "../params/dropout_mask.h"
#include "kernel_info.h"

namespace lk {

cudaError_t launch_dropout_mask(const DropoutMaskParams& params, cudaStream_t stream);
KernelInfo describe_dropout_mask();

}  // namespace lk
