// The launch of dequantize, emulated.
#pragma once

#include <utility>
#include <vector>

#include "../kernels/dequantize.cuh"
#include "../launch/dequantize.h"
#include "launch_over_torch.h"
#include "packed_parts.h"

namespace lk {

// first_row: the first that memory is there for.
inline cudaError_t launch_from(int64_t first_row, const DequantizeParams& p, const DequantizeConfig& config,
                               cudaStream_t stream) {
  Memory memory;
  add_parts(memory, p.weight, first_row);
  const int64_t first = first_row * p.weight.k, count = p.runs.count * p.runs.length - first;
  memory.output(static_cast<char*>(p.out) + first * size_of(p.type), count * size_of(p.type));
  const DequantizeKey key{p.weight.layout, p.type, config.aligned};
  return with_variant(DequantizeVariants{}, key, [&]<class Kernel>(Kernel) {
    return run<Kernel>(&dequantize_kernel<Kernel>, config.aligned, config.blocks - options.first_block, p, memory,
                       stream);
  });
}

// Since the test last asked, with their streams.
inline std::vector<std::pair<WeightRuns, cudaStream_t>> decoded_runs;

inline cudaError_t launch_dequantize(const DequantizeParams& p, const DequantizeConfig& config, cudaStream_t stream) {
  decoded_runs.emplace_back(p.runs, stream);
  return launch_from(0, p, config, stream);
}

}  // namespace lk
