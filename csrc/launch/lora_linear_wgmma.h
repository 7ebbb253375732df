// lora_linear's launches on sm_90a. LK_NO_WGMMA: the build has none (setup.py).
#pragma once

#include <type_traits>
#include <vector>

#include "lora_linear.h"

namespace lk {

#if defined(LK_NO_WGMMA)
inline bool encodes_tensor_maps() { return false; }
template <class Element>
constexpr bool kHasWgmma = false;
#else
// Whether the driver does.
bool encodes_tensor_maps();
template <class Element>
constexpr bool kHasWgmma = !std::is_same_v<Element, TensorFloat32>;
#endif

template <class Element>
cudaError_t launch_lora_linear_wgmma(const LoraLinearParams& params, const LoraLinearConfig& config,
                                     cudaStream_t stream);
template <class Element>
KernelInfo describe_lora_linear_wgmma(const LoraKey& key);
template <class Element>
std::vector<KernelInfo> lora_linear_wgmma_kernels();

}  // namespace lk
