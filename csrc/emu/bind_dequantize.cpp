// The CUDA binding of dequantize as it is, over CPU tensors and emulated launches: an op of
// `lora_kernels_emulated_dequantize`. Test only.
#include "../kernels/dequantize.cuh"
#include "../launch/dequantize.h"
#include "launch_over_torch.h"

namespace lk {

namespace {

// `first`: the first weight that memory is there for.
cudaError_t launch_from(int64_t first, const DequantizeParams& p, const DequantizeConfig& config, cudaStream_t stream) {
  const Codes4Weight& w = p.weight;
  const size_t scale = w.scales2 == nullptr ? sizeof(float) : 1;
  const int64_t count = w.count - first, scales = count / w.block;
  Memory memory;
  memory.input(w.data + first / 2, 1, 1, count / 2, 0);
  memory.input(static_cast<const char*>(w.scales) + first / w.block * scale, scale, 1, scales, 0);
  memory.input(w.code, sizeof(float), 1, Codes4::kCodes, 0);
  memory.input(w.scales2, sizeof(float), 1, blocks_of(scales, kScalesPerScale2), 0);
  memory.input(w.code2, sizeof(float), 1, 256, 0);
  memory.input(w.offset, sizeof(float), 1, 1, 0);
  memory.output(static_cast<char*>(p.out) + first * size_of(p.type), count * size_of(p.type));
  return with_variant(RowVariants<DequantizeCodes4>{}, RowsKey{p.type, config.aligned}, [&]<class Kernel>(Kernel) {
    return run<Kernel>(&dequantize_kernel<Kernel>, config.aligned, config.blocks - options.first_block, p, memory,
                       stream);
  });
}

// bf16 from parts at these addresses, as if `first_block` blocks of threads had weights in front of them.
void dequantize_behind(int first_block, bool aligned, uintptr_t data, uintptr_t scales, uintptr_t code, uintptr_t out,
                       int64_t count, int64_t block) {
  const int64_t first = first_block * weights_per_block(aligned);
  const DequantizeParams p{.weight = {.data = reinterpret_cast<const uint8_t*>(data - first / 2),
                                      .scales = reinterpret_cast<const void*>(scales - first / block * sizeof(float)),
                                      .code = reinterpret_cast<const float*>(code),
                                      .scales2 = nullptr,
                                      .code2 = nullptr,
                                      .offset = nullptr,
                                      .count = first + count,
                                      .block = block},
                           .type = FloatType::kBFloat16,
                           .out = reinterpret_cast<void*>(out - first * 2)};
  options = {.first_block = first_block};
  launch_from(first, p, dequantize_config(p.weight.count, block, aligned), nullptr);
  options = {};
}

}  // namespace

cudaError_t launch_dequantize(const DequantizeParams& p, const DequantizeConfig& config, cudaStream_t stream) {
  return launch_from(0, p, config, stream);
}

}  // namespace lk

#define CUDA CPU
#define lora_kernels_native lora_kernels_emulated_dequantize
#include "../bind/dequantize_cuda.cpp"
#undef CUDA

// Where some of the parts are on another device than the others.
STABLE_TORCH_LIBRARY_IMPL(lora_kernels_emulated_dequantize, Meta, m) {
  m.impl("dequantize", TORCH_BOX(&lk::dequantize));
}

PYBIND11_MODULE(_emu_dequantize, m) {
  lk::define_launch(m);
  m.def("dequantize_behind", &lk::dequantize_behind);
}
