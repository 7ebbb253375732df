// gated_activation and its gradients on CUDA.
#include "../launch/gated_activation.h"
#include "cuda_device.h"
#include "gated_activation.h"

namespace lk {
namespace {

template <class... Tensors>
GatedActivationConfig config_of(const Tensor& gate, const Tensors&... others) {
  STD_TORCH_CHECK(float_type(gate) != FloatType::kFloat64,
                  "gated_activation: the CUDA kernels serve float32, bfloat16 and float16");
  const auto begins = [](const Tensor& t) {
    return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kChunkBytes == 0;
  };
  return gated_config(float_type(gate), gate.numel(), (begins(gate) && ... && begins(others)));
}

void gated_activation_out(Tensor gate, Tensor up, std::string activation, Tensor h) {
  const CudaCall device(gate);
  const GatedActivationParams p = gated_params(gate, up, activation, h);
  check_cuda(launch_gated_activation(p, config_of(gate, up, h), device.stream), "gated_activation");
}

void gated_activation_backward_out(Tensor grad_h, Tensor gate, Tensor up, std::string activation, Tensor grad_gate,
                                   Tensor grad_up) {
  const CudaCall device(gate);
  const GatedActivationBackwardParams p = gated_params(grad_h, gate, up, activation, grad_gate, grad_up);
  const GatedActivationConfig config = config_of(gate, grad_h, up, grad_gate, grad_up);
  check_cuda(launch_gated_activation_backward(p, config, device.stream), "gated_activation_backward");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CUDA, m) {
  m.impl("gated_activation_out", TORCH_BOX(&gated_activation_out));
  m.impl("gated_activation_backward_out", TORCH_BOX(&gated_activation_backward_out));
}

}  // namespace lk
