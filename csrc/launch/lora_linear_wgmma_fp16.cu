#include "lora_linear_wgmma.cuh"

namespace lk {

template cudaError_t launch_lora_linear_wgmma<Float16>(const LoraLinearParams&, const LoraLinearConfig&, cudaStream_t);
template KernelInfo describe_lora_linear_wgmma<Float16>(const LoraKey&);
template std::vector<KernelInfo> lora_linear_wgmma_kernels<Float16>();

}  // namespace lk
