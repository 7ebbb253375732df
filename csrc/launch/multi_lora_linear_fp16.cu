#include "multi_lora_linear.cuh"

namespace lk {

template cudaError_t launch_multi_lora_decode<Float16>(const MultiLoraDecodeParams&, const LoraLinearConfig&,
                                                       cudaStream_t);
template cudaError_t launch_multi_lora_branch<Float16>(const MultiLoraBranchParams&, const LoraLinearConfig&,
                                                       cudaStream_t);
template cudaError_t launch_multi_lora_grads<Float16>(const MultiLoraGradsParams&, const LoraGradsConfig&,
                                                      cudaStream_t);
template KernelInfo describe_multi_lora_decode<Float16>(const LoraKey&);
template KernelInfo describe_multi_lora_branch<Float16>(const LoraKey&);
template KernelInfo describe_multi_lora_grads<Float16>(const LoraGradsKey&);
template std::vector<KernelInfo> multi_lora_kernels<Float16>();

}  // namespace lk
