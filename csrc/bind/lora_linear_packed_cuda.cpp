// lora_linear_packed on CUDA, for few rows: tensors to a launch.
#include <string>
#include <tuple>
#include <vector>

#include "../launch/lora_linear_packed.h"
#include "cuda_counters.h"
#include "lora_checks.h"
#include "lora_rows.h"
#include "packed_parts.h"
#include "rows.h"

namespace lk {
namespace {

std::tuple<Tensor, Tensor> lora_linear_packed(Tensor x, std::vector<Tensor> weight, std::string layout, int64_t n,
                                              int64_t k, int64_t block, ScalarType, Tensor lora_A, Tensor lora_B,
                                              std::optional<Tensor> bias, std::optional<Tensor> seed, double scaling,
                                              double, std::string) {
  const PackedParts packed = packed_parts(weight, layout, n, k, block);
  STD_TORCH_CHECK(packed.layout == PackedLayout::kCodes4, "lora_linear_packed: the CUDA kernel serves layout codes4");
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) == k, "x must be [..., k]");
  STD_TORCH_CHECK(is_beside(x, weight[0]), "weight must be on x's device");
  check_adapter(x, n, k, lora_A, lora_B, seed);
  check_bias(x, n, bias);
  const FloatType type = float_type(x);
  STD_TORCH_CHECK(type == FloatType::kBFloat16 || type == FloatType::kFloat16,
                  "lora_linear_packed: the CUDA kernel serves bfloat16 and float16");
  const CudaCall call(x);
  const Tensor rows = whole_rows(x), a = adapter_rows(lora_A, x), b = adapter_rows(lora_B, x);
  const std::optional<Tensor> bias_row = contiguous(bias);
  const int64_t m = rows.size(0), rank = a.size(0);
  const bool aligned =
      rows_aligned(rows) && rows_aligned(a) && reinterpret_cast<uintptr_t>(packed.data) % kChunkBytes == 0;
  STD_TORCH_CHECK(
      serves_packed(m, k, block, rank, aligned, seed.has_value()),
      "lora_linear_packed: the CUDA kernel serves few rows without dropout, blocks of 64 weights or a larger "
      "power of two, and ranks up to 64");
  const Tensor y = new_empty_as(x, {m, n}), s = new_empty_as(x, {m, rank});
  const LoraLinearPackedConfig config = lora_linear_packed_config(m, n, k, rank);
  const Counters counters(x, call, config.counters);
  const Tensor partials = new_empty_as(x, {config.partials}, ScalarType::Float);
  const LoraLinearPackedParams p{.weight = packed,
                                 .x = rows.const_data_ptr(),
                                 .x_stride = rows.stride(0),
                                 .a = a.const_data_ptr(),
                                 .a_stride = a.stride(0),
                                 .b = b.const_data_ptr(),
                                 .b_stride = b.stride(0),
                                 .bias = bias_row ? bias_row->const_data_ptr() : nullptr,
                                 .y = y.mutable_data_ptr(),
                                 .s = s.mutable_data_ptr(),
                                 .counters = counters.data(),
                                 .partials = static_cast<float*>(partials.mutable_data_ptr()),
                                 .m = static_cast<int32_t>(m),
                                 .n = static_cast<int32_t>(n),
                                 .k = static_cast<int32_t>(k),
                                 .rank = static_cast<int32_t>(rank),
                                 .parts = config.parts,
                                 .scaling = static_cast<float>(scaling),
                                 .adapter_type = float_type(a)};
  check_cuda(launch_lora_linear_packed(p, type, config, call.stream), "lora_linear_packed");
  return {with_leading_sizes_of(y, x), with_leading_sizes_of(s, x)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CUDA, m) {
  m.impl("lora_linear_packed", TORCH_BOX(&lora_linear_packed));
}

}  // namespace lk
