#include "../kernels/prefix_kv.cuh"
#include "prefix_kv.h"
#include "variant.h"

namespace lk {

cudaError_t launch_prefix_kv(const PrefixKvParams& p, const PrefixConfig& config, cudaStream_t stream) {
  return with_variant(RowVariants<PrefixKv>{}, RowsKey{p.type, config.aligned}, [&]<class Kernel>(Kernel) {
    return launch_variant<Kernel>(&prefix_kv_kernel<Kernel>, config.blocks, p, stream);
  });
}

KernelInfo describe_prefix_kv(FloatType type, bool aligned) {
  return describe_one<PrefixKvParams>(RowVariants<PrefixKv>{}, RowsKey{type, aligned}, "prefix_kv_kernel");
}

cudaError_t launch_prefix_kv_backward(const PrefixKvBackwardParams& p, const PrefixConfig& config,
                                      cudaStream_t stream) {
  return with_variant(RowVariants<PrefixKvBackward>{}, RowsKey{p.type, config.aligned}, [&]<class Kernel>(Kernel) {
    return launch_variant<Kernel>(&prefix_kv_backward_kernel<Kernel>, config.blocks, p, stream);
  });
}

KernelInfo describe_prefix_kv_backward(FloatType type, bool aligned) {
  return describe_one<PrefixKvBackwardParams>(RowVariants<PrefixKvBackward>{}, RowsKey{type, aligned},
                                              "prefix_kv_backward_kernel");
}

std::vector<KernelInfo> prefix_kv_kernels() {
  std::vector<KernelInfo> all = describe_all<PrefixKvParams>(RowVariants<PrefixKv>{}, "prefix_kv_kernel");
  const auto backward =
      describe_all<PrefixKvBackwardParams>(RowVariants<PrefixKvBackward>{}, "prefix_kv_backward_kernel");
  all.insert(all.end(), backward.begin(), backward.end());
  return all;
}

}  // namespace lk
