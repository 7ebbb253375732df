#include "multi_lora_linear.cuh"

namespace lk {

template cudaError_t launch_multi_lora_decode<BFloat16>(const MultiLoraDecodeParams&, const LoraLinearConfig&,
                                                        cudaStream_t);
template cudaError_t launch_multi_lora_branch<BFloat16>(const MultiLoraBranchParams&, const LoraLinearConfig&,
                                                        cudaStream_t);
template cudaError_t launch_multi_lora_grads<BFloat16>(const MultiLoraGradsParams&, const LoraGradsConfig&,
                                                       cudaStream_t);
template KernelInfo describe_multi_lora_decode<BFloat16>(const LoraKey&);
template KernelInfo describe_multi_lora_branch<BFloat16>(const LoraKey&);
template KernelInfo describe_multi_lora_grads<BFloat16>(const LoraGradsKey&);
template std::vector<KernelInfo> multi_lora_kernels<BFloat16>();

}  // namespace lk
