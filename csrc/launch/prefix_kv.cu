#include "../kernels/prefix_kv.cuh"
#include "prefix_kv.h"
#include "variant.h"

namespace lk {

cudaError_t launch_prefix_kv(const PrefixKvParams& p, const PrefixConfig& config, cudaStream_t stream) {
  return with_prompt_variant<PrefixKv>(p.type, config.aligned, [&](auto variant) {
    using Variant = decltype(variant);
    return launch_variant<Variant>(&prefix_kv_kernel<Variant>, config.blocks, p, stream);
  });
}

KernelInfo describe_prefix_kv(FloatType type, bool aligned) {
  return with_prompt_variant<PrefixKv>(type, aligned, [](auto variant) {
    return describe_variant<decltype(variant), PrefixKvParams>("prefix_kv_kernel");
  });
}

cudaError_t launch_prefix_kv_backward(const PrefixKvBackwardParams& p, const PrefixConfig& config,
                                      cudaStream_t stream) {
  return with_prompt_variant<PrefixKvBackward>(p.type, config.aligned, [&](auto variant) {
    using Variant = decltype(variant);
    return launch_variant<Variant>(&prefix_kv_backward_kernel<Variant>, config.blocks, p, stream);
  });
}

KernelInfo describe_prefix_kv_backward(FloatType type, bool aligned) {
  return with_prompt_variant<PrefixKvBackward>(type, aligned, [](auto variant) {
    return describe_variant<decltype(variant), PrefixKvBackwardParams>("prefix_kv_backward_kernel");
  });
}

}  // namespace lk
