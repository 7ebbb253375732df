// The CUDA binding of lora_linear as it is, over CPU tensors, on a GPU of capability 9.0: forwards and
// gradients of x of schedule "wgmma" are emulated, as ops of `lora_kernels_emulated_wgmma`. Other launches are those of
// bind_lora_linear.cpp. Test only.
#include "../kernels/frozen_linear_wgmma.cuh"
#include "../kernels/lora_linear_wgmma_variants.cuh"
#include "../launch/lora_linear_wgmma.h"
#include "../launch/lora_wgmma_boxes.h"
#include "launch_over_torch.h"
#include "lora_memory.h"

namespace lk {

inline bool driver_encodes = true;
inline std::vector<unsigned char> last_s, last_parts;  // of the last launch of dX: dY B, and parts of dB
inline bool is_frozen = false;                         // no branch: the tests' yardstick
bool encodes_tensor_maps() { return driver_encodes; }

template <class Element>
cudaError_t launch_lora_linear_wgmma(const LoraLinearParams& p, const LoraLinearConfig& config, cudaStream_t stream) {
  if (config.blocks == 0) return cudaSuccess;
  RowsApart y(p.y, p.m, p.n, Boxes::kElementBytes);
  LoraLinearParams lora = p;
  lora.y = y.data();
  lora.y_stride = y.stride();
  LoraWgmmaParams params = wgmma_params(lora, config.key);
  with_maps(params, config.key, [](TensorMap& map, const Boxes& b) {
    map = emu::encoded({.data = reinterpret_cast<uint64_t>(b.data),
                        .rows = static_cast<uint64_t>(b.rows),
                        .columns = static_cast<uint64_t>(b.columns),
                        .stride_bytes = static_cast<uint64_t>(b.stride) * Boxes::kElementBytes,
                        .box_rows = b.box_rows,
                        .box_columns = b.box_columns,
                        .swizzle_bytes = b.swizzle_bytes()});
    return true;
  });
  Memory memory;
  for_each_range(lora, config, Boxes::kElementBytes, [&](const MemoryRef& ref) { add(memory, ref); });
  memory.input(p.counters, sizeof(uint32_t), 1, config.counters, 0);
  options.by_clocks = true;
  return with_variant(AllLoraWgmmaVariants<Element>{}, config.key, [&]<class Kernel>(Kernel) {
    const auto launch = [&]<class Launched>(std::type_identity<Launched>) {
      return run<Launched>(&lora_linear_wgmma_kernel<Launched>, true, config.blocks, params, memory, stream);
    };
    options.cluster = Kernel::kCluster;
    const auto frozen = [&] {
      if constexpr (Kernel::kCluster == 1) {
        return launch(std::type_identity<FrozenLinearWgmma<typename Kernel::Loop>>{});
      } else {
        return cudaErrorLaunchFailure;  // the yardstick is none of clusters
      }
    };
    const cudaError_t error = is_frozen ? frozen() : launch(std::type_identity<Kernel>{});
    y.copy_back();
    const auto bytes = [](const void* begin, int64_t count) {
      const auto* const first = static_cast<const unsigned char*>(begin);
      return first == nullptr ? std::vector<unsigned char>() : std::vector<unsigned char>(first, first + count);
    };
    last_s = bytes(p.s, 2 * p.m * p.rank);
    last_parts = bytes(p.partial_grad_b, sizeof(float) * blocks_of(p.m, Kernel::kM) * p.k * 16);
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
// Gradients of the adapter stay as they are: what they are made of is asked for below.
template <class Element>
cudaError_t launch_lora_grads(const LoraGradsParams&, const LoraGradsConfig&, cudaStream_t) {
  return cudaSuccess;
}

}  // namespace lk

#define CUDA CPU
#define lora_kernels_native lora_kernels_emulated_wgmma
#include "../bind/lora_linear_cuda.cpp"
#undef CUDA

PYBIND11_MODULE(_emu_lora_linear_wgmma, m) {
  using lk::emu::runtime;
  lk::define_launch(m);
  const auto bytes = [](const std::vector<unsigned char>& of) {
    return pybind11::bytes(reinterpret_cast<const char*>(of.data()), of.size());
  };
  m.def("grad_s", [bytes] { return bytes(lk::last_s); });
  m.def("parts_of_grad_b", [bytes] { return bytes(lk::last_parts); });
  m.def("set_frozen", [](bool frozen) { lk::is_frozen = frozen; });
  m.def("set_device", [](int sms, int capability, bool driver_encodes) {
    runtime.sms = sms;
    runtime.capability = capability;
    lk::driver_encodes = driver_encodes;
    lk::known_limits.forget();
  });
}
