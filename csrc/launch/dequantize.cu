#include "../kernels/dequantize.cuh"
#include "dequantize.h"
#include "variant.h"

namespace lk {

cudaError_t launch_dequantize(const DequantizeParams& p, const DequantizeConfig& config, cudaStream_t stream) {
  return with_variant(RowVariants<DequantizeCodes4>{}, RowsKey{p.type, config.aligned}, [&]<class Kernel>(Kernel) {
    return launch_variant<Kernel>(&dequantize_kernel<Kernel>, config.blocks, p, stream);
  });
}

KernelInfo describe_dequantize(FloatType type, bool aligned) {
  return describe_one<DequantizeParams>(RowVariants<DequantizeCodes4>{}, RowsKey{type, aligned}, "dequantize_kernel");
}

std::vector<KernelInfo> dequantize_kernels() {
  return describe_all<DequantizeParams>(RowVariants<DequantizeCodes4>{}, "dequantize_kernel");
}

}  // namespace lk
