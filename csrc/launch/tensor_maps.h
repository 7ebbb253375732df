// Tensor maps, which the driver encodes. Nothing is linked: the driver's function is asked for when it is needed.
#pragma once

#include <cuda.h>  // types
#include <cuda_runtime_api.h>

#include "lora_wgmma_boxes.h"

namespace lk {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);  // a type; nobody refers to the symbol

// Null where there is no driver, or none that knows tensor maps: CUDA 12.0 and newer do.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* address = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &address, cudaEnableDefault, &found);
#endif
    if (error != cudaSuccess) cudaGetLastError();  // the next launch would return it
    const bool is_there = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return is_there ? reinterpret_cast<EncodeTiled>(address) : nullptr;
  }();
  return function;
}

inline bool encode(TensorMap& map, const Boxes& boxes, CUtensorMapDataType type) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
  const EncodeTiled encode = encode_tiled();
  if (encode == nullptr) return false;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(boxes.columns), static_cast<cuuint64_t>(boxes.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(boxes.stride) * Boxes::kElementBytes};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(boxes.box_columns), static_cast<cuuint32_t>(boxes.box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const auto swizzle = boxes.swizzle_bytes() == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_32B;
  return encode(reinterpret_cast<CUtensorMap*>(&map), type, 2, const_cast<void*>(boxes.data), sizes, strides, box,
                steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace lk
