// prefix_kv and its backward on CUDA.
#include <string>

#include "../launch/prefix_kv.h"
#include "cuda_device.h"
#include "prefix_kv.h"

namespace lk {
namespace {

void check_types(FloatType type, FloatType prefix_type) {
  STD_TORCH_CHECK(
      gpu_converts(type, prefix_type),
      "prefix_kv: the CUDA kernels serve float32, bfloat16 and float16, with a prefix of the same type or float32");
}

bool head_rows_aligned(int64_t head_dim, const Tensor& t) {
  return rows_aligned(t) && head_dim * static_cast<int64_t>(t.element_size()) % kChunkBytes == 0;
}

Tensor prefix_kv(Tensor prefix, int64_t layers, int64_t heads, int64_t batch, bool copies, ScalarType dtype,
                 std::string) {
  const CudaCall device(prefix);
  const PrefixKvCall call = prefix_kv_call(prefix, layers, heads, batch, copies, dtype);
  const PrefixKvParams& p = call.params;
  check_types(p.type, p.prefix_type);
  const bool aligned =
      head_rows_aligned(p.sizes.head_dim, call.prefix) && head_rows_aligned(p.sizes.head_dim, call.out);
  check_cuda(launch_prefix_kv(p, prefix_config(p.sizes, p.type, p.prefix_type, aligned), device.stream), "prefix_kv");
  return call.output(batch);
}

Tensor prefix_kv_backward(std::vector<Tensor> grads, ScalarType dtype, std::string) {
  STD_TORCH_CHECK(!grads.empty(), "prefix_kv_backward: no gradients");
  const CudaCall device(grads[0]);
  const PrefixKvBackwardCall call = prefix_kv_backward_call(grads, dtype);
  bool aligned = true;
  for (const Tensor& grad : call.grads) aligned = aligned && rows_aligned(grad);
  for (const PrefixKvBackwardParams& p : call.launches) {
    check_types(p.type, p.prefix_type);
    const bool all =
        aligned && p.sizes.head_dim * static_cast<int64_t>(call.grad_prefix.element_size()) % kChunkBytes == 0;
    check_cuda(launch_prefix_kv_backward(p, prefix_config(p.sizes, p.type, p.prefix_type, all), device.stream),
               "prefix_kv_backward");
  }
  return call.grad_prefix;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CUDA, m) {
  m.impl("prefix_kv", TORCH_BOX(&prefix_kv));
  m.impl("prefix_kv_backward", TORCH_BOX(&prefix_kv_backward));
}

}  // namespace lk
