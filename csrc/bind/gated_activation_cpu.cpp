// gated_activation and its gradients on the CPU.
#include "../cpu/kernels.h"
#include "gated_activation.h"

namespace lk {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements that are worth a thread

void check_type(const Tensor& gate) {
  STD_TORCH_CHECK(float_type(gate) != FloatType::kFloat64,
                  "gated_activation: the kernels compute in fp32, so gate must not be fp64");
}

void gated_activation_out(Tensor gate, Tensor up, std::string activation, Tensor h) {
  check_type(gate);
  const GatedActivationParams p = gated_params(gate, up, activation, h);
  torch::stable::parallel_for(0, p.count, kGrain,
                              [&](int64_t begin, int64_t end) { cpu::kernels().gated->forward(p, begin, end); });
}

void gated_activation_backward_out(Tensor grad_h, Tensor gate, Tensor up, std::string activation, Tensor grad_gate,
                                   Tensor grad_up) {
  check_type(gate);
  const GatedActivationBackwardParams p = gated_params(grad_h, gate, up, activation, grad_gate, grad_up);
  torch::stable::parallel_for(0, p.count, kGrain,
                              [&](int64_t begin, int64_t end) { cpu::kernels().gated->backward(p, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CPU, m) {
  m.impl("gated_activation_out", TORCH_BOX(&gated_activation_out));
  m.impl("gated_activation_backward_out", TORCH_BOX(&gated_activation_backward_out));
}

}  // namespace lk
