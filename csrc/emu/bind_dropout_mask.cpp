// The CUDA binding of dropout_mask as it is, over CPU tensors and emulated launches: an op of
// `lora_kernels_emulated_mask`. Test only.
#include "../kernels/dropout_mask.cuh"
#include "../launch/dropout_mask.h"
#include "launch_over_torch.h"

namespace lk {

struct DropoutMaskVariant {
  static constexpr int kThreads = kDropoutMaskThreads, kSharedBytes = 0;
};

cudaError_t launch_dropout_mask(const DropoutMaskParams& p, cudaStream_t) {
  const int64_t blocks = dropout_mask_blocks(p, 3);
  if (blocks == 0) return cudaSuccess;
  Memory memory;
  memory.input(p.seed, sizeof *p.seed, 1, 1, 0);
  memory.output(p.keep, p.rows * p.columns);
  return run<DropoutMaskVariant>(&dropout_mask_kernel, true, blocks, p, memory);
}

}  // namespace lk

#define CUDA CPU
#define lora_kernels_native lora_kernels_emulated_mask
#include "../bind/dropout_mask_cuda.cpp"
#undef CUDA

PYBIND11_MODULE(_emu_dropout_mask, m) { lk::define_launch(m); }
