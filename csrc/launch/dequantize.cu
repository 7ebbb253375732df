#include "../kernels/dequantize.cuh"
#include "dequantize.h"
#include "variant.h"

namespace lk {

cudaError_t launch_dequantize(const DequantizeParams& p, const DequantizeConfig& config, cudaStream_t stream) {
  const DequantizeKey key{p.weight.layout, p.type, config.aligned};
  return with_variant(DequantizeVariants{}, key, [&]<class Kernel>(Kernel) {
    return launch_variant<Kernel>(&dequantize_kernel<Kernel>, config.blocks, p, stream);
  });
}

KernelInfo describe_dequantize(PackedLayout layout, FloatType type, bool aligned) {
  return describe_one<DequantizeParams>(DequantizeVariants{}, DequantizeKey{layout, type, aligned},
                                        "dequantize_kernel");
}

std::vector<KernelInfo> dequantize_kernels() {
  return describe_all<DequantizeParams>(DequantizeVariants{}, "dequantize_kernel");
}

}  // namespace lk
