// dropout_mask's launch.
#pragma once

#include "../params/dropout_mask.h"
#include "kernel_info.h"

namespace lk {

cudaError_t launch_dropout_mask(const DropoutMaskParams& params, cudaStream_t stream);

// Whether the current device has this kernel, in machine code or in PTX that its driver compiles.
cudaError_t find_dropout_mask_kernel();

KernelInfo describe_dropout_mask();

}  // namespace lk
