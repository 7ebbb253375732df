// cross_entropy_rows on CUDA.
#include "../launch/cross_entropy_rows.h"
#include "cross_entropy_rows.h"
#include "cuda_device.h"

namespace lk {
namespace {

Tensor cross_entropy_rows(Tensor logits, Tensor labels, std::optional<Tensor> grad_losses, int64_t ignore_index,
                          double label_smoothing, double softcap, double logit_scale, ScalarType grad_dtype) {
  const CudaCall device(logits);
  const CrossEntropyCall call =
      cross_entropy_call(logits, labels, grad_losses, ignore_index, label_smoothing, softcap, logit_scale, grad_dtype);
  const CrossEntropyParams& p = call.params;
  STD_TORCH_CHECK(p.grad_type != FloatType::kFloat64,
                  "cross_entropy_rows: the CUDA kernels write gradients of float32, bfloat16 and float16");
  // A block counts columns in 32 bits, and looks at some behind the last.
  STD_TORCH_CHECK(p.columns <= INT32_MAX - 2 * kCrossEntropyThreads * kChunkBytes,
                  "cross_entropy_rows: logits has too many columns for the CUDA kernels");
  const CrossEntropyConfig config = cross_entropy_config(p.rows, rows_aligned(call.logits));
  check_cuda(launch_cross_entropy_rows(p, config, device.stream), "cross_entropy_rows");
  return call.losses;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CUDA, m) {
  m.impl("cross_entropy_rows", TORCH_BOX(&cross_entropy_rows));
}

}  // namespace lk
