// The CUDA binding of prefix_kv as it is, over CPU tensors and emulated launches: ops of
// `lora_kernels_emulated_prefix`. Test only.
#include "../kernels/prefix_kv.cuh"
#include "../launch/prefix_kv.h"
#include "launch_over_torch.h"

namespace lk {

cudaError_t launch_prefix_kv(const PrefixKvParams& p, const PrefixConfig& config, cudaStream_t stream) {
  const PrefixSizes& s = p.sizes;
  const int64_t width = s.parts * s.heads * s.head_dim;
  Memory memory;
  memory.input(p.prefix, size_of(p.prefix_type), s.tokens, width, p.prefix_stride);
  memory.output(p.out, s.batch * s.tokens * width * size_of(p.type));
  return with_variant(RowVariants<PrefixKv>{}, RowsKey{p.type, config.aligned}, [&]<class Kernel>(Kernel) {
    return run<Kernel>(&prefix_kv_kernel<Kernel>, config.aligned, config.blocks, p, memory, stream);
  });
}

cudaError_t launch_prefix_kv_backward(const PrefixKvBackwardParams& p, const PrefixConfig& config,
                                      cudaStream_t stream) {
  const PrefixSizes& s = p.sizes;
  const size_t element = size_of(p.type), width = s.parts * s.heads * s.head_dim * size_of(p.prefix_type);
  Memory memory;
  for (int part = 0; part < s.parts; ++part) {
    const PrefixGrad& grad = p.grads[part];
    for (int64_t row = 0; row < s.batch * s.heads; ++row) {
      const int64_t offset = row / s.heads * grad.batch_stride + row % s.heads * grad.head_stride;
      memory.input(static_cast<const char*>(grad.data) + offset * element, element, s.tokens, s.head_dim,
                   grad.token_stride);
    }
  }
  for (int64_t t = 0; t < s.tokens; ++t) {
    memory.output(static_cast<char*>(p.grad_prefix) + t * p.grad_prefix_stride * size_of(p.prefix_type), width);
  }
  return with_variant(RowVariants<PrefixKvBackward>{}, RowsKey{p.type, config.aligned}, [&]<class Kernel>(Kernel) {
    return run<Kernel>(&prefix_kv_backward_kernel<Kernel>, config.aligned, config.blocks, p, memory, stream);
  });
}

}  // namespace lk

#define CUDA CPU
#define lora_kernels_native lora_kernels_emulated_prefix
#include "../bind/prefix_kv_cuda.cpp"
#undef CUDA

// Where some of the tensors are on another device than the others.
STABLE_TORCH_LIBRARY_IMPL(lora_kernels_emulated_prefix, Meta, m) {
  m.impl("prefix_kv_backward", TORCH_BOX(&lk::prefix_kv_backward));
}

PYBIND11_MODULE(_emu_prefix_kv, m) { lk::define_launch(m); }
