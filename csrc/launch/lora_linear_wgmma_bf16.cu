#include "lora_linear_wgmma.cuh"

namespace lk {

bool encodes_tensor_maps() { return encode_tiled() != nullptr; }

template cudaError_t launch_lora_linear_wgmma<BFloat16>(const LoraLinearParams&, const LoraLinearConfig&, cudaStream_t);
template KernelInfo describe_lora_linear_wgmma<BFloat16>(const LoraKey&);
template std::vector<KernelInfo> lora_linear_wgmma_kernels<BFloat16>();

}  // namespace lk
