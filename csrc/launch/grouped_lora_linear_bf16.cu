#include "grouped_lora_linear.cuh"

namespace lk {

template cudaError_t launch_grouped_lora<BFloat16>(const GroupedLoraLinearParams&, const GroupedLoraConfig&,
                                                   cudaStream_t);
template cudaError_t launch_grouped_lora_grads<BFloat16>(const GroupedLoraGradsParams&, const LoraGradsConfig&,
                                                         cudaStream_t);
template KernelInfo describe_grouped_lora<BFloat16>(const GroupedLoraKey&);
template KernelInfo describe_grouped_lora_grads<BFloat16>(const LoraGradsKey&);
template std::vector<KernelInfo> grouped_lora_kernels<BFloat16>();

}  // namespace lk
