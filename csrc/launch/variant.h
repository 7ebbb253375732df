// The launch of a kernel variant.
#pragma once

#include "../kernels/lora_linear_variants.cuh"
#include "launch.h"

namespace lk {

template <class Variant, class Params>
cudaError_t launch_variant(void (*kernel)(Params), int64_t blocks, const Params& p, cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;  // tickets are 32 bits wide
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Variant::kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), Variant::kThreads, Variant::kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace lk
