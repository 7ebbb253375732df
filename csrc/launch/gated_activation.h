// gated_activation's launch, and its gradients'.
#pragma once

#include <vector>

#include "../config/gated_activation.h"
#include "kernel_info.h"

namespace lk {

cudaError_t launch_gated_activation(const GatedActivationParams& params, const GatedActivationConfig& config,
                                    cudaStream_t stream);
cudaError_t launch_gated_activation_backward(const GatedActivationBackwardParams& params,
                                             const GatedActivationConfig& config, cudaStream_t stream);
KernelInfo describe_gated_activation(FloatType type, bool aligned);
KernelInfo describe_gated_activation_backward(FloatType type, bool aligned);
std::vector<KernelInfo> gated_activation_kernels();

}  // namespace lk
