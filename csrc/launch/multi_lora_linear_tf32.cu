#include "multi_lora_linear.cuh"

namespace lk {

template cudaError_t launch_multi_lora_decode<TensorFloat32>(const MultiLoraDecodeParams&, const LoraLinearConfig&,
                                                             cudaStream_t);
template cudaError_t launch_multi_lora_branch<TensorFloat32>(const MultiLoraBranchParams&, const LoraLinearConfig&,
                                                             cudaStream_t);
template cudaError_t launch_multi_lora_grads<TensorFloat32>(const MultiLoraGradsParams&, const LoraGradsConfig&,
                                                            cudaStream_t);
template KernelInfo describe_multi_lora_decode<TensorFloat32>(const LoraKey&);
template KernelInfo describe_multi_lora_branch<TensorFloat32>(const LoraKey&);
template KernelInfo describe_multi_lora_grads<TensorFloat32>(const LoraGradsKey&);
template std::vector<KernelInfo> multi_lora_kernels<TensorFloat32>();

}  // namespace lk
