#include "lora_linear.cuh"

namespace lk {

template cudaError_t launch_lora_grad_x<BFloat16>(const LoraLinearParams&, const LoraLinearConfig&, cudaStream_t);
template KernelInfo describe_lora_grad_x<BFloat16>(const LoraLinearConfig&);
template cudaError_t launch_lora_grads<BFloat16>(const LoraGradsParams&, const LoraGradsConfig&, cudaStream_t);
template KernelInfo describe_lora_grads<BFloat16>(const LoraGradsConfig&);

}  // namespace lk
