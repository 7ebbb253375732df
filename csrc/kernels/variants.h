// Lists of kernels, each with the key that a configuration asks for it by.
#pragma once

#include <stdexcept>

namespace lk {

// A kernel is a class with `run(params)`, threads and shared memory; it has no state.
template <auto kKey_, class Kernel_>
struct Variant {
  static constexpr auto kKey = kKey_;
  using Kernel = Kernel_;
};

template <class... Variants>
struct VariantList {};

// The variants of several lists.
template <class... Lists>
struct Concatenated;
template <class List>
struct Concatenated<List> {
  using Type = List;
};
template <class... First, class... Second, class... Rest>
struct Concatenated<VariantList<First...>, VariantList<Second...>, Rest...>
    : Concatenated<VariantList<First..., Second...>, Rest...> {};
template <class... Lists>
using Concat = typename Concatenated<Lists...>::Type;

// f(Kernel{}) for the kernel with this key.
template <class First, class... Rest, class Key, class F>
auto with_variant(VariantList<First, Rest...>, const Key& key, const F& f) {
  if (First::kKey == key) return f(typename First::Kernel{});
  if constexpr (sizeof...(Rest) > 0) {
    return with_variant(VariantList<Rest...>{}, key, f);
  } else {
    throw std::logic_error("no kernel has this key");
    return f(typename First::Kernel{});
  }
}

// f(Kernel{}) for each.
template <class... Variants, class F>
void for_each_variant(VariantList<Variants...>, const F& f) {
  (f(typename Variants::Kernel{}), ...);
}

}  // namespace lk
