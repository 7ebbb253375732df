#include "lora_linear.cuh"

namespace lk {

template cudaError_t launch_lora_linear<TensorFloat32>(const LoraLinearParams&, const LoraLinearConfig&, cudaStream_t);
template KernelInfo describe_lora_linear<TensorFloat32>(const LoraLinearConfig&);

}  // namespace lk
