// The CUDA binding of lora_linear_packed as it is, over CPU tensors and emulated launches: an op of
// `lora_kernels_emulated_packed`. Test only.
#include "../kernels/lora_linear_packed.cuh"
#include "../launch/lora_linear_packed.h"
#include "launch_over_torch.h"

namespace lk {

cudaError_t launch_lora_linear_packed(const LoraLinearPackedParams& p, FloatType type,
                                      const LoraLinearPackedConfig& config, cudaStream_t stream) {
  const Codes4Weight& w = p.weight;
  const int64_t scales = w.count / w.block;
  const size_t element = size_of(type), adapter = size_of(p.adapter_type);
  Memory memory;
  memory.input(w.data, 1, 1, w.count / 2, 0);
  memory.input(w.scales, w.scales2 == nullptr ? sizeof(float) : 1, 1, scales, 0);
  memory.input(w.code, sizeof(float), 1, Codes4::kCodes, 0);
  memory.input(w.scales2, sizeof(float), 1, blocks_of(scales, kScalesPerScale2), 0);
  memory.input(w.code2, sizeof(float), 1, 256, 0);
  memory.input(w.offset, sizeof(float), 1, 1, 0);
  memory.input(p.x, element, p.m, p.k, p.x_stride);
  memory.input(p.a, adapter, p.rank, p.k, p.a_stride);
  memory.input(p.b, adapter, p.n, p.rank, p.b_stride);
  memory.input(p.bias, element, 1, p.n, 0);
  memory.output(p.y, static_cast<int64_t>(p.m) * p.n * element);
  memory.output(p.s, static_cast<int64_t>(p.m) * p.rank * element);
  memory.output(p.partials, config.partials * sizeof(float));
  memory.input(p.counters, sizeof(uint32_t), 1, config.counters, 0);
  return with_variant(LoraLinearPackedVariants{}, PackedKey{type, config.row_tile}, [&]<class Kernel>(Kernel) {
    return run<Kernel>(&lora_linear_packed_kernel<Kernel>, true, config.blocks, p, memory, stream);
  });
}

}  // namespace lk

#define CUDA CPU
#define lora_kernels_native lora_kernels_emulated_packed
#include "../bind/lora_linear_packed_cuda.cpp"
#undef CUDA

PYBIND11_MODULE(_emu_lora_linear_packed, m) { lk::define_launch(m); }
