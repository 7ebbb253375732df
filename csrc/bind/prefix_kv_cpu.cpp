// prefix_kv and its backward on the CPU.
#include <string>

#include "../cpu/prefix_kv.h"
#include "prefix_kv.h"

namespace lk {
namespace {

constexpr int64_t kGrain = 1 << 13;  // elements of output that are worth a thread

template <class F>
void for_items(int64_t items, int64_t item_elements, const F& f) {
  torch::stable::parallel_for(0, items, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, item_elements)), f);
}

Tensor prefix_kv(Tensor prefix, int64_t layers, int64_t heads, int64_t batch, bool copies, ScalarType dtype,
                 std::string) {
  const PrefixKvCall call = prefix_kv_call(prefix, layers, heads, batch, copies, dtype);
  const PrefixKvParams& p = call.params;
  if (call.out.numel() > 0) {
    for_items(p.sizes.parts * p.sizes.heads, p.sizes.batch * p.sizes.tokens * p.sizes.head_dim,
              [&](int64_t begin, int64_t end) { cpu::prefix_heads(p, begin, end); });
  }
  return call.output(batch);
}

Tensor prefix_kv_backward(std::vector<Tensor> grads, ScalarType dtype, std::string) {
  const PrefixKvBackwardCall call = prefix_kv_backward_call(grads, dtype);
  for (const PrefixKvBackwardParams& p : call.launches) {
    for_items(p.sizes.tokens * p.sizes.parts * p.sizes.heads, p.sizes.batch * p.sizes.head_dim,
              [&](int64_t begin, int64_t end) { cpu::prefix_grad_rows(p, begin, end); });
  }
  return call.grad_prefix;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CPU, m) {
  m.impl("prefix_kv", TORCH_BOX(&prefix_kv));
  m.impl("prefix_kv_backward", TORCH_BOX(&prefix_kv_backward));
}

}  // namespace lk
