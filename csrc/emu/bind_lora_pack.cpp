// The CUDA binding of lora_pack and its gradients as it is, over CPU tensors and emulated launches: ops of
// `lora_kernels_emulated_pack`. Test only.
#define LK_NO_WGMMA
#include "../kernels/lora_pack_variants.cuh"
#include "../launch/lora_pack.h"
#include "../launch/lora_pack_problem.h"
#include "launch_over_torch.h"
#include "lora_linear_launches.h"

namespace lk {

inline std::vector<int> tile_rows;         // of packs' launches since the test last asked
inline std::vector<unsigned char> last_s;  // every member's s, or s'

template <class Element>
cudaError_t launch_lora_pack(const LoraPackParams& p, const LoraPackConfig& config, cudaStream_t stream) {
  constexpr int kBytes = sizeof(typename Element::Storage);
  const LoraLinearConfig& launch = config.launch;
  uint32_t* const counters = p.members[0].counters;
  lora_launches.push_back({.schedule = "pack",
                           .access = launch.key.access,
                           .counters_were_zero = all_zero(counters, launch.counters),
                           .stream = stream});
  tile_rows.push_back(tile_shape(config.key.tile).rows);
  Memory memory;
  for_each_range(p, config, kBytes, [&](const MemoryRef& ref) { add(memory, ref); });
  memory.input(counters, sizeof(uint32_t), 1, launch.counters, 0);
  return with_variant(PackVariants<Element>{}, config.key, [&]<class Kernel>(Kernel) {
    lora_launches.back().report = emulate<Kernel>(&lora_pack_kernel<Kernel>, launch.blocks, p, memory);
    if (!all_zero(counters, launch.counters)) throw std::runtime_error("the launch left a counter other than zero");
    last_s.clear();
    for (int i = 0; i < p.count; ++i) {
      const auto* const s = static_cast<const unsigned char*>(p.members[i].s);
      last_s.insert(last_s.end(), s, s + static_cast<int64_t>(p.members[i].m) * p.members[i].rank * kBytes);
    }
    return cudaSuccess;
  });
}

}  // namespace lk

#define CUDA CPU
#define lora_kernels_native lora_kernels_emulated_pack
#include "../bind/lora_pack_cuda.cpp"
#undef CUDA

PYBIND11_MODULE(_emu_lora_pack, m) {
  lk::define_options(m);
  lk::define_device(m);
  m.def("launches", [] {
    pybind11::list all;
    for (const lk::LoraLaunch& launch : lk::lora_launches) {
      pybind11::dict d;
      d["schedule"] = launch.schedule;
      d["counters_were_zero"] = launch.counters_were_zero;
      d["report"] = launch.report;
      all.append(d);
    }
    lk::lora_launches.clear();
    return all;
  });
  m.def("tile_rows", [] { return std::exchange(lk::tile_rows, {}); });
  m.def("s", [] { return pybind11::bytes(reinterpret_cast<const char*>(lk::last_s.data()), lk::last_s.size()); });
}
