// The CUDA binding of dequantize as it is, over CPU tensors and emulated launches: an op of
// `lora_kernels_emulated_dequantize`. Test only.
#include "../kernels/dequantize.cuh"
#include "../launch/dequantize.h"
#include "launch_over_torch.h"
#include "packed_parts.h"

namespace lk {

namespace {

// first_row: the first that memory is there for.
cudaError_t launch_from(int64_t first_row, const DequantizeParams& p, const DequantizeConfig& config,
                        cudaStream_t stream) {
  Memory memory;
  add_parts(memory, p.weight, first_row);
  const int64_t first = first_row * p.weight.k, count = (p.weight.n - first_row) * p.weight.k;
  memory.output(static_cast<char*>(p.out) + first * size_of(p.type), count * size_of(p.type));
  const DequantizeKey key{p.weight.layout, p.type, config.aligned};
  return with_variant(DequantizeVariants{}, key, [&]<class Kernel>(Kernel) {
    return run<Kernel>(&dequantize_kernel<Kernel>, config.aligned, config.blocks - options.first_block, p, memory,
                       stream);
  });
}

// bf16 from parts at these addresses, as if there were `rows_before` rows of weights, and of scales, in front of them.
void dequantize_behind(int64_t rows_before, const std::string& layout, bool aligned, uintptr_t data, uintptr_t scales,
                       uintptr_t code, uintptr_t out, int64_t n, int64_t k, int64_t block) {
  const bool packs_two = layout == "codes4";
  const int64_t before = rows_before * k, columns = blocks_of(k, block);
  PackedParts w{};
  w.data = reinterpret_cast<const uint8_t*>(data - (packs_two ? before / 2 : before));
  w.scales = reinterpret_cast<const void*>(scales - rows_before * columns * sizeof(float));
  w.code = reinterpret_cast<const float*>(code);
  w.n = static_cast<int32_t>(rows_before + n);
  w.k = static_cast<int32_t>(k);
  w.block = static_cast<int32_t>(block);
  w.block_rows = 1;
  w.block_columns = static_cast<int32_t>(columns);
  w.layout = packs_two ? PackedLayout::kCodes4 : PackedLayout::kE4M3;
  const DequantizeParams p{.weight = w, .type = FloatType::kBFloat16, .out = reinterpret_cast<void*>(out - before * 2)};
  const DequantizeConfig config = dequantize_config(w, aligned);
  options = {.first_block = static_cast<int>(before / weights_per_block(w.layout, aligned))};
  launch_from(rows_before, p, config, nullptr);
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
