// The CUDA binding of dequantize as it is, over CPU tensors and emulated launches: an op of
// `lora_kernels_emulated_dequantize`. Test only.
#include "dequantize_launch.h"

#define CUDA CPU
#define lora_kernels_native lora_kernels_emulated_dequantize
#include "../bind/dequantize_cuda.cpp"
#undef CUDA

namespace lk {
namespace {

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
  const WeightRuns runs = rows_of(w, 0, w.n);
  const DequantizeParams p{
      .weight = w, .runs = runs, .type = FloatType::kBFloat16, .out = reinterpret_cast<void*>(out - before * 2)};
  const DequantizeConfig config = dequantize_config(w, runs, aligned);
  const int64_t per_block = weights_at_once(w.layout, aligned) * (aligned ? kDequantizeWarps : kDequantizeThreads);
  options = {.first_block = static_cast<int>(before / per_block)};
  launch_from(rows_before, p, config, nullptr);
  options = {};
}

// [rows of the runs, length] of a weight's runs.
Tensor decode_runs(std::vector<Tensor> weight, std::string layout, int64_t n, int64_t k, int64_t block,
                   ScalarType dtype, int64_t begin, int64_t end, bool columns) {
  const PackedParts packed = packed_parts(weight, layout, n, k, block);
  const WeightRuns runs = columns ? columns_of(packed, begin, end) : rows_of(packed, begin, end);
  const Tensor out = new_empty_as(weight[0], {columns ? n : end - begin, columns ? end - begin : k}, dtype);
  decode(packed, runs, out, emu::runtime.stream);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_emulated_dequantize, CPU, m) { m.impl("decode_runs", TORCH_BOX(&decode_runs)); }

}  // namespace
}  // namespace lk

// Where some of the parts are on another device than the others.
STABLE_TORCH_LIBRARY_IMPL(lora_kernels_emulated_dequantize, Meta, m) {
  m.impl("dequantize", TORCH_BOX(&lk::dequantize));
}

PYBIND11_MODULE(_emu_dequantize, m) {
  lk::define_launch(m);
  m.def("dequantize_behind", &lk::dequantize_behind);
}
