// lora_linear on CUDA: tensors to Params, the config for them, one launch.
#include <stdexcept>
#include <string>
#include <tuple>

#include "../launch/launch.h"
#include "aten.h"
#include "cuda_counters.h"

namespace lk {
namespace {

// The elements of a 16-bit tensor, whichever type they are.
const uint16_t* elements(const Tensor& t) { return static_cast<const uint16_t*>(t.const_data_ptr()); }
uint16_t* mutable_elements(const Tensor& t) { return static_cast<uint16_t*>(t.mutable_data_ptr()); }

// An adapter as the kernel reads it. fp32 adapters over 16-bit activations are rounded here and nowhere else.
Tensor adapter_rows(const Tensor& adapter, const Tensor& x) { return as_rows(cast(adapter, x.scalar_type())); }

// Whether every row of every matrix begins where a chunk may.
bool rows_aligned(std::initializer_list<const Tensor*> matrices) {
  return std::all_of(matrices.begin(), matrices.end(), [](const Tensor* t) {
    return reinterpret_cast<uintptr_t>(t->const_data_ptr()) % kChunkBytes == 0 && t->stride(0) % kChunkElements == 0;
  });
}

bool is_bf16(const Tensor& x) {
  if (x.scalar_type() == ScalarType::BFloat16) return true;
  if (x.scalar_type() == ScalarType::Half) return false;
  throw std::runtime_error("lora_linear: the CUDA kernels serve bfloat16 and float16");
}

std::tuple<Tensor, Tensor> lora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B,
                                       std::optional<Tensor> bias, std::optional<Tensor> seed, double scaling,
                                       double dropout_p, std::string) {
  const CudaCall call(x);
  const Tensor rows = as_rows(x), w = as_rows(weight), a = adapter_rows(lora_A, x), b = adapter_rows(lora_B, x);
  if (bias) bias = torch::stable::contiguous(*bias);
  const int64_t m = rows.size(0), k = rows.size(1), n = w.size(0), rank = a.size(0);
  const Tensor y = new_empty_as(x, {m, n}), s = new_empty_as(x, {m, rank});
  const auto launch = is_bf16(x) ? launch_lora_linear_bf16 : launch_lora_linear_fp16;
  const bool aligned = whole_chunks(n, k, rank) && rows_aligned({&rows, &w, &a, &b, &y, &s});
  const LoraLinearConfig config = lora_linear_config(m, n, rank, aligned, device_limits(call.device));
  if (config.blocks > 0) {
    const Counters counters(x, call, config.counters);
    const Dropout dropout = make_dropout(0, dropout_p);
    const LoraLinearParams p{.x = elements(rows),
                             .w = elements(w),
                             .a = elements(a),
                             .b = elements(b),
                             .bias = bias ? elements(*bias) : nullptr,
                             .y = mutable_elements(y),
                             .s = mutable_elements(s),
                             .x_stride = rows.stride(0),
                             .w_stride = w.stride(0),
                             .a_stride = a.stride(0),
                             .b_stride = b.stride(0),
                             .y_stride = y.stride(0),
                             .m = static_cast<int32_t>(m),
                             .n = static_cast<int32_t>(n),
                             .k = static_cast<int32_t>(k),
                             .rank = static_cast<int32_t>(rank),
                             .scaling = static_cast<float>(scaling),
                             .dropout_threshold = dropout.threshold,
                             .dropout_scale = dropout.scale,
                             .seed = seed ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr,
                             .counters = counters.data(),
                             .group_rows = config.group_rows};
    counters.check(launch(p, config, call.stream), "lora_linear");
  }
  return {with_leading_sizes_of(y, x), with_leading_sizes_of(s, x)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CUDA, m) { m.impl("lora_linear", TORCH_BOX(&lora_linear)); }

}  // namespace lk
