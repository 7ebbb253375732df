// Some weights of a packed matrix, decoded on CUDA.
#pragma once

#include "../launch/dequantize.h"
#include "cuda_device.h"
#include "packed_parts.h"
#include "rows.h"

namespace lk {

// Into `out`, contiguous, of as many elements.
inline void decode(const PackedParts& packed, const WeightRuns& runs, const Tensor& out, cudaStream_t stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(packed.data) % kChunkBytes == 0;
  const DequantizeParams p{.weight = packed, .runs = runs, .type = float_type(out), .out = out.mutable_data_ptr()};
  check_cuda(launch_dequantize(p, dequantize_config(packed, runs, aligned), stream), "dequantize");
}

}  // namespace lk
