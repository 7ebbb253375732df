#include "lora_pack.cuh"

namespace lk {

template cudaError_t launch_lora_pack<TensorFloat32>(const LoraPackParams&, const LoraPackConfig&, cudaStream_t);
template KernelInfo describe_lora_pack<TensorFloat32>(const LoraPackKey&);
template std::vector<KernelInfo> lora_pack_kernels<TensorFloat32>();

}  // namespace lk
