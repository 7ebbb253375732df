#include "lora_linear.cuh"

namespace lk {

template cudaError_t launch_lora_linear<Float16>(const LoraLinearParams&, const LoraLinearConfig&, cudaStream_t);
template KernelInfo describe_lora_linear<Float16>(const LoraKey&);
template std::vector<KernelInfo> lora_linear_kernels<Float16>();

}  // namespace lk
