#include "lora_linear.cuh"

namespace lk {

template cudaError_t launch_lora_grad_x<TensorFloat32>(const LoraLinearParams&, const LoraLinearConfig&, cudaStream_t);
template cudaError_t launch_lora_grads<TensorFloat32>(const LoraGradsParams&, const LoraGradsConfig&, cudaStream_t);
template KernelInfo describe_lora_grad_x<TensorFloat32>(const LoraKey&);
template KernelInfo describe_lora_grads<TensorFloat32>(const LoraGradsKey&);
template std::vector<KernelInfo> lora_backward_kernels<TensorFloat32>();

}  // namespace lk
