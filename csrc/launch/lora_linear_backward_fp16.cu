#include "lora_linear.cuh"

namespace lk {

template cudaError_t launch_lora_grad_x<Float16>(const LoraLinearParams&, const LoraLinearConfig&, cudaStream_t);
template cudaError_t launch_lora_grads<Float16>(const LoraGradsParams&, const LoraGradsConfig&, cudaStream_t);
template KernelInfo describe_lora_grad_x<Float16>(const LoraKey&);
template KernelInfo describe_lora_grads<Float16>(const LoraGradsKey&);
template std::vector<KernelInfo> lora_backward_kernels<Float16>();

}  // namespace lk
