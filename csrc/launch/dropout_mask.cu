#include "../kernels/dropout_mask.cuh"
#include "dropout_mask.h"
#include "variant.h"

namespace lk {

cudaError_t launch_dropout_mask(const DropoutMaskParams& p, cudaStream_t stream) {
  const int64_t blocks = dropout_mask_blocks(p, 65536);
  if (blocks == 0) return cudaSuccess;
  dropout_mask_kernel<<<static_cast<unsigned>(blocks), kDropoutMaskThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t find_dropout_mask_kernel() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, dropout_mask_kernel);
}

KernelInfo describe_dropout_mask() {
  return {.name = "_ZN2lk" + mangled_identifier("dropout_mask_kernel") + "ENS_" + mangled_in_lk<DropoutMaskParams>(),
          .threads = kDropoutMaskThreads,
          .shared_bytes = 0};
}

}  // namespace lk
