// The CUDA binding of gated_activation as it is, over CPU tensors and emulated launches: ops of
// `lora_kernels_emulated_gated`. Test only.
#include <algorithm>

#include "../kernels/gated_activation.cuh"
#include "../launch/gated_activation.h"
#include "launch_over_torch.h"

namespace lk {
namespace {

// What a launch writes over its own input keeps what it has.
void output_apart_from(Memory& memory, void* out, size_t bytes, std::initializer_list<const void*> inputs) {
  if (std::find(inputs.begin(), inputs.end(), out) == inputs.end()) memory.output(out, bytes);
}

}  // namespace

cudaError_t launch_gated_activation(const GatedActivationParams& p, const GatedActivationConfig& config,
                                    cudaStream_t stream) {
  const size_t element = size_of(p.type);
  Memory memory;
  for (const void* in : {p.gate, p.up}) memory.input(in, element, 1, p.count, 0);
  output_apart_from(memory, p.h, p.count * element, {p.gate, p.up});
  return with_variant(RowVariants<GatedActivation>{}, RowsKey{p.type, config.aligned}, [&]<class Kernel>(Kernel) {
    return run<Kernel>(&gated_activation_kernel<Kernel>, config.aligned, config.blocks, p, memory, stream);
  });
}

cudaError_t launch_gated_activation_backward(const GatedActivationBackwardParams& p,
                                             const GatedActivationConfig& config, cudaStream_t stream) {
  const size_t element = size_of(p.type);
  Memory memory;
  for (const void* in : {p.grad_h, p.gate, p.up}) memory.input(in, element, 1, p.count, 0);
  for (void* out : {p.grad_gate, p.grad_up}) {
    output_apart_from(memory, out, p.count * element, {p.grad_h, p.gate, p.up});
  }
  const RowsKey key{p.type, config.aligned};
  return with_variant(RowVariants<GatedActivationBackward>{}, key, [&]<class Kernel>(Kernel) {
    return run<Kernel>(&gated_activation_backward_kernel<Kernel>, config.aligned, config.blocks, p, memory, stream);
  });
}

}  // namespace lk

#define CUDA CPU
#define lora_kernels_native lora_kernels_emulated_gated
#include "../bind/gated_activation_cuda.cpp"
#undef CUDA

namespace lk {
namespace {

// h in bf16 at these addresses, as if there were so many elements in front of them.
void gated_behind(int64_t before, bool aligned, uintptr_t gate, uintptr_t up, uintptr_t h, int64_t count) {
  const auto first = [&](uintptr_t address) { return reinterpret_cast<void*>(address - before * 2); };
  const GatedActivationParams p{.type = FloatType::kBFloat16,
                                .activation = Activation::kSilu,
                                .gate = first(gate),
                                .up = first(up),
                                .h = first(h),
                                .count = before + count};
  Memory memory;
  for (uintptr_t in : {gate, up}) memory.input(reinterpret_cast<const void*>(in), 2, 1, count, 0);
  memory.output(reinterpret_cast<void*>(h), count * 2);
  const int64_t per_block = static_cast<int64_t>(kGatedThreads) * gated_group(p.type, aligned);
  options = {.first_block = static_cast<int>(before / per_block)};
  with_variant(RowVariants<GatedActivation>{}, RowsKey{p.type, aligned}, [&]<class Kernel>(Kernel) {
    return run<Kernel>(&gated_activation_kernel<Kernel>, aligned, blocks_of(count, per_block), p, memory, nullptr);
  });
  options = {};
}

}  // namespace
}  // namespace lk

PYBIND11_MODULE(_emu_gated_activation, m) {
  lk::define_launch(m);
  m.def("gated_behind", &lk::gated_behind);
}
