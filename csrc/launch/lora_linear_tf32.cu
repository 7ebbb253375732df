#include "lora_linear.cuh"

namespace lk {

template cudaError_t launch_lora_linear<TensorFloat32>(const LoraLinearParams&, const LoraLinearConfig&, cudaStream_t);
template KernelInfo describe_lora_linear<TensorFloat32>(const LoraKey&);
template std::vector<KernelInfo> lora_linear_kernels<TensorFloat32>();

}  // namespace lk
