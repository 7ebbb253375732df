// What is known of a kernel without a GPU.
#pragma once

#include <string>
#include <typeinfo>

#include "launch.h"

namespace lk {

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
          .shared_bytes = Variant::kSharedBytes};
}

}  // namespace lk
