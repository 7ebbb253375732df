// The CUDA binding of cross_entropy_rows as it is, over CPU tensors and emulated launches: an op of
// `lora_kernels_emulated_cross_entropy`. Test only.
#include "../kernels/cross_entropy_rows.cuh"
#include "../launch/cross_entropy_rows.h"
#include "launch_over_torch.h"

namespace lk {

cudaError_t launch_cross_entropy_rows(const CrossEntropyParams& p, const CrossEntropyConfig& config,
                                      cudaStream_t stream) {
  Memory memory;
  memory.input(p.logits, sizeof(float), p.rows, p.columns, p.stride);
  memory.input(p.labels, sizeof *p.labels, 1, p.rows, 0);
  memory.input(p.grad_losses, sizeof *p.grad_losses, 1, p.rows, 0);
  memory.output(p.losses, p.rows * sizeof *p.losses);
  return with_variant(RowVariants<CrossEntropyRows>{}, RowsKey{p.grad_type, config.aligned}, [&]<class Kernel>(Kernel) {
    return run<Kernel>(&cross_entropy_rows_kernel<Kernel>, config.aligned, config.blocks, p, memory, stream);
  });
}

}  // namespace lk

#define CUDA CPU
#define lora_kernels_native lora_kernels_emulated_cross_entropy
#include "../bind/cross_entropy_rows_cuda.cpp"
#undef CUDA

PYBIND11_MODULE(_emu_cross_entropy_rows, m) { lk::define_launch(m); }
