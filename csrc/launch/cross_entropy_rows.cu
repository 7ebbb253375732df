#include "../kernels/cross_entropy_rows.cuh"
#include "cross_entropy_rows.h"
#include "variant.h"

namespace lk {

cudaError_t launch_cross_entropy_rows(const CrossEntropyParams& p, const CrossEntropyConfig& config,
                                      cudaStream_t stream) {
  return with_variant(RowVariants<CrossEntropyRows>{}, RowsKey{p.grad_type, config.aligned}, [&]<class Kernel>(Kernel) {
    return launch_variant<Kernel>(&cross_entropy_rows_kernel<Kernel>, config.blocks, p, stream);
  });
}

KernelInfo describe_cross_entropy_rows(FloatType grad_type, bool aligned) {
  return describe_one<CrossEntropyParams>(RowVariants<CrossEntropyRows>{}, RowsKey{grad_type, aligned},
                                          "cross_entropy_rows_kernel");
}

std::vector<KernelInfo> cross_entropy_rows_kernels() {
  return describe_all<CrossEntropyParams>(RowVariants<CrossEntropyRows>{}, "cross_entropy_rows_kernel");
}

}  // namespace lk
