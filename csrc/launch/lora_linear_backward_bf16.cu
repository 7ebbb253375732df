#include "lora_linear.cuh"

namespace lk {

template cudaError_t launch_lora_grad_x<BFloat16>(const LoraLinearParams&, const LoraLinearConfig&, cudaStream_t);
template cudaError_t launch_lora_grads<BFloat16>(const LoraGradsParams&, const LoraGradsConfig&, cudaStream_t);
template KernelInfo describe_lora_grad_x<BFloat16>(const LoraKey&);
template KernelInfo describe_lora_grads<BFloat16>(const LoraGradsKey&);
template std::vector<KernelInfo> lora_backward_kernels<BFloat16>();

}  // namespace lk
