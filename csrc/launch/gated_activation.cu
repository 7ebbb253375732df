#include "../kernels/gated_activation.cuh"
#include "gated_activation.h"
#include "variant.h"

namespace lk {

cudaError_t launch_gated_activation(const GatedActivationParams& p, const GatedActivationConfig& config,
                                    cudaStream_t stream) {
  return with_variant(RowVariants<GatedActivation>{}, RowsKey{p.type, config.aligned}, [&]<class Kernel>(Kernel) {
    return launch_variant<Kernel>(&gated_activation_kernel<Kernel>, config.blocks, p, stream);
  });
}

KernelInfo describe_gated_activation(FloatType type, bool aligned) {
  return describe_one<GatedActivationParams>(RowVariants<GatedActivation>{}, RowsKey{type, aligned},
                                             "gated_activation_kernel");
}

cudaError_t launch_gated_activation_backward(const GatedActivationBackwardParams& p,
                                             const GatedActivationConfig& config, cudaStream_t stream) {
  const RowsKey key{p.type, config.aligned};
  return with_variant(RowVariants<GatedActivationBackward>{}, key, [&]<class Kernel>(Kernel) {
    return launch_variant<Kernel>(&gated_activation_backward_kernel<Kernel>, config.blocks, p, stream);
  });
}

KernelInfo describe_gated_activation_backward(FloatType type, bool aligned) {
  return describe_one<GatedActivationBackwardParams>(RowVariants<GatedActivationBackward>{}, RowsKey{type, aligned},
                                                     "gated_activation_backward_kernel");
}

std::vector<KernelInfo> gated_activation_kernels() {
  std::vector<KernelInfo> all =
      describe_all<GatedActivationParams>(RowVariants<GatedActivation>{}, "gated_activation_kernel");
  const auto backward = describe_all<GatedActivationBackwardParams>(RowVariants<GatedActivationBackward>{},
                                                                    "gated_activation_backward_kernel");
  all.insert(all.end(), backward.begin(), backward.end());
  return all;
}

}  // namespace lk
