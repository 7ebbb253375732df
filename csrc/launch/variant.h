// The launch of a kernel variant, and what is known of it without a GPU.
#pragma once

#include <cstdint>
#include <string>
#include <typeinfo>
#include <vector>

#include "../kernels/variants.h"
#include "kernel_info.h"

namespace lk {

// Blocks of a cluster.
template <class Variant>
constexpr int cluster_of() {
  if constexpr (requires { Variant::kCluster; }) {
    return Variant::kCluster;
  } else {
    return 1;
  }
}

template <class Variant, class Params>
cudaError_t launch_variant(void (*kernel)(Params), int64_t blocks, const Params& p, cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;  // tickets are 32 bits wide
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Variant::kSharedBytes);
  if (error != cudaSuccess) return error;
  if constexpr (cluster_of<Variant>() == 1) {
    kernel<<<static_cast<unsigned>(blocks), Variant::kThreads, Variant::kSharedBytes, stream>>>(p);
    return cudaGetLastError();
  } else {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {cluster_of<Variant>(), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(Variant::kThreads);
    config.dynamicSmemBytes = Variant::kSharedBytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, p);
  }
}

// The runtime names its kernels (cudaFuncGetName) only where there is a driver. But the Itanium ABI spells the template
// argument of `void lk::kernel<Variant>(Params)` as it does that of a class `lk::Variants<Variant>`, which typeid
// names.
template <class Variant>
struct Variants {};

// <length><name>, as the ABI writes an identifier.
inline std::string mangled_identifier(const std::string& name) { return std::to_string(name.size()) + name; }

// The rest of a type's name behind the mangled `namespace lk::`.
template <class T>
std::string mangled_in_lk() {
  return std::string(typeid(T).name()).substr(std::string("N2lk").size());
}

// kernel: the template's plain name.
template <class Variant, class Params>
KernelInfo describe_variant(const std::string& kernel) {
  const std::string argument = mangled_in_lk<Variants<Variant>>().substr(mangled_identifier("Variants").size());
  return {.name = "_ZN2lk" + mangled_identifier(kernel) + argument + "vNS_" + mangled_in_lk<Params>(),
          .threads = Variant::kThreads,
          .shared_bytes = Variant::kSharedBytes,
          .cluster = cluster_of<Variant>()};
}

// Of the kernel with this key, and of every kernel of a list.
template <class Params, class List, class Key>
KernelInfo describe_one(List list, const Key& key, const std::string& kernel) {
  return with_variant(list, key, [&]<class Kernel>(Kernel) { return describe_variant<Kernel, Params>(kernel); });
}

template <class Params, class List>
std::vector<KernelInfo> describe_all(List list, const std::string& kernel) {
  std::vector<KernelInfo> all;
  for_each_variant(list, [&]<class Kernel>(Kernel) { all.push_back(describe_variant<Kernel, Params>(kernel)); });
  return all;
}

}  // namespace lk
