// The CUDA binding of lora_linear as it is, over CPU tensors, on a GPU of capability 9.0: forwards and
// gradients of x of schedule "wgmma" are emulated, as ops of `lora_kernels_emulated_wgmma`. Other launches are those of
// bind_lora_linear.cpp. Test only.
#include "../kernels/lora_linear_wgmma_variants.cuh"
#include "../launch/lora_linear_wgmma.h"
#include "../launch/lora_wgmma_boxes.h"
#include "launch_over_torch.h"
#include "lora_memory.h"

namespace lk {

inline bool driver_encodes = true;
inline std::vector<unsigned char> last_s;  // dY B, as the launch of dX finds it
bool encodes_tensor_maps() { return driver_encodes; }

template <class Element>
cudaError_t launch_lora_linear_wgmma(const LoraLinearParams& p, const LoraLinearConfig& config, cudaStream_t stream) {
  if (config.blocks == 0) return cudaSuccess;
  last_s.assign(static_cast<const unsigned char*>(p.s), static_cast<const unsigned char*>(p.s) + 2 * p.m * p.rank);
  RowsApart y(p.y, p.m, p.n, Boxes::kElementBytes);
  LoraWgmmaParams params{};
  params.lora = p;
  params.lora.y = y.data();
  params.lora.y_stride = y.stride();
  with_maps(params, config.key, [](TensorMap& map, const Boxes& b) {
    map = emu::encoded({.data = reinterpret_cast<uint64_t>(b.data),
                        .rows = static_cast<uint64_t>(b.rows),
                        .columns = static_cast<uint64_t>(b.columns),
                        .stride_bytes = static_cast<uint64_t>(b.stride) * Boxes::kElementBytes,
                        .box_rows = b.box_rows,
                        .box_columns = Boxes::kColumns,
                        .swizzle_bytes = Boxes::kSwizzleBytes});
    return true;
  });
  Memory memory;
  for_each_range(params.lora, config, Boxes::kElementBytes, [&](const MemoryRef& ref) { add(memory, ref); });
  memory.input(p.counters, sizeof(uint32_t), 1, config.counters, 0);
  options.by_clocks = true;
  return with_variant(AllLoraWgmmaVariants<Element>{}, config.key, [&]<class Kernel>(Kernel) {
    const cudaError_t error =
        run<Kernel>(&lora_linear_wgmma_kernel<Kernel>, true, config.blocks, params, memory, stream);
    y.copy_back();
    return error;
  });
}

// Not here.
template <class Element>
cudaError_t launch_lora_linear(const LoraLinearParams&, const LoraLinearConfig& config, cudaStream_t) {
  return config.blocks == 0 ? cudaSuccess : cudaErrorLaunchFailure;
}
template <class Element>
cudaError_t launch_lora_grad_x(const LoraLinearParams&, const LoraLinearConfig& config, cudaStream_t) {
  return config.blocks == 0 ? cudaSuccess : cudaErrorLaunchFailure;
}
template <class Element>
cudaError_t launch_lora_grads(const LoraGradsParams&, const LoraGradsConfig& config, cudaStream_t) {
  return config.blocks == 0 ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace lk

#define CUDA CPU
#define lora_kernels_native lora_kernels_emulated_wgmma
#include "../bind/lora_linear_cuda.cpp"
#undef CUDA

PYBIND11_MODULE(_emu_lora_linear_wgmma, m) {
  using lk::emu::runtime;
  lk::define_launch(m);
  m.def("grad_s", [] { return pybind11::bytes(reinterpret_cast<const char*>(lk::last_s.data()), lk::last_s.size()); });
  m.def("set_device", [](int sms, int capability, bool driver_encodes) {
    runtime.sms = sms;
    runtime.capability = capability;
    lk::driver_encodes = driver_encodes;
    lk::known_limits.forget();
  });
}
