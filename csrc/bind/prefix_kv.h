// prefix_kv and its gradient on any device: tensors to Params, and the outputs.
#pragma once

#include "../params/prefix_kv.h"
#include "rows.h"

namespace lk {

// One forward.
struct PrefixKvCall {
  Tensor prefix, out;  // out: [layers, 2, 1 or batch, heads, tokens, head_dim]
  PrefixKvParams params;

  // [layers, 2, batch, heads, tokens, head_dim]; samples that are not copies of their own lie at one address.
  Tensor output(int64_t batch) const {
    std::vector<int64_t> sizes(out.sizes().begin(), out.sizes().end()),
        strides(out.strides().begin(), out.strides().end());
    if (sizes[2] == batch) return out;
    sizes[2] = batch;
    strides[2] = 0;
    AtenTensorHandle view;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch__reinterpret_tensor(out.get(), out.dim(), sizes.data(), strides.data(), 0, &view));
    return Tensor(view);
  }
};

inline PrefixKvCall prefix_kv_call(const Tensor& prefix, int64_t layers, int64_t heads, int64_t batch, bool copies,
                                   ScalarType dtype) {
  STD_TORCH_CHECK(layers > 0 && heads > 0 && batch >= 0,
                  "prefix_kv: layers and heads must be at least 1, and batch not negative");
  STD_TORCH_CHECK(prefix.dim() == 2 && prefix.size(1) % (2 * layers * heads) == 0,
                  "prefix_kv: prefix must be [tokens, layers * 2 * heads * head_dim]");
  const Tensor rows = with_contiguous_rows(prefix);
  const int64_t tokens = rows.size(0), width = rows.size(1), written = copies ? batch : 1;
  const int64_t head_dim = width / (2 * layers * heads);
  PrefixKvCall call{
      .prefix = rows, .out = new_empty_as(rows, {layers, 2, written, heads, tokens, head_dim}, dtype), .params = {}};
  call.params = {.sizes = {tokens, 2 * layers, heads, head_dim, written},
                 .type = float_type(call.out),
                 .prefix_type = float_type(rows),
                 .prefix = rows.const_data_ptr(),
                 .prefix_stride = rows.stride(0),
                 .out = call.out.mutable_data_ptr()};
  return call;
}

// One backward: a launch for every kPrefixGrads parts.
struct PrefixKvBackwardCall {
  std::vector<Tensor> grads;
  Tensor grad_prefix;
  std::vector<PrefixKvBackwardParams> launches;
};

inline PrefixKvBackwardCall prefix_kv_backward_call(const std::vector<Tensor>& grads, ScalarType dtype) {
  STD_TORCH_CHECK(!grads.empty() && grads[0].dim() == 4,
                  "prefix_kv_backward: grads must be [batch, heads, tokens, head_dim], at least one");
  const int64_t batch = grads[0].size(0), heads = grads[0].size(1), tokens = grads[0].size(2),
                head_dim = grads[0].size(3), parts = static_cast<int64_t>(grads.size());
  const int64_t width = parts * heads * head_dim;
  PrefixKvBackwardCall call{.grads = {}, .grad_prefix = new_empty_as(grads[0], {tokens, width}, dtype), .launches = {}};
  for (const Tensor& grad : grads) {
    STD_TORCH_CHECK(
        std::equal(grad.sizes().begin(), grad.sizes().end(), grads[0].sizes().begin(), grads[0].sizes().end()) &&
            grad.scalar_type() == grads[0].scalar_type() && is_beside(grads[0], grad),
        "prefix_kv_backward: the gradients differ in shape, dtype or device");
    call.grads.push_back(with_contiguous_rows(grad));
  }
  for (int64_t first = 0; first < parts; first += kPrefixGrads) {
    PrefixKvBackwardParams& p = call.launches.emplace_back();
    p.sizes = {tokens, std::min<int64_t>(parts - first, kPrefixGrads), heads, head_dim, batch};
    p.type = float_type(grads[0]);
    p.prefix_type = float_type(call.grad_prefix);
    p.grad_prefix = static_cast<char*>(call.grad_prefix.mutable_data_ptr()) +
                    first * heads * head_dim * call.grad_prefix.element_size();
    p.grad_prefix_stride = width;
    for (int64_t i = 0; i < p.sizes.parts; ++i) {
      const Tensor& grad = call.grads[first + i];
      p.grads[i] = {grad.const_data_ptr(), grad.stride(0), grad.stride(1), grad.stride(2)};
    }
  }
  return call;
}

}  // namespace lk
