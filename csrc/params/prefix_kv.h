// prefix_kv's parameters, and its gradient's.
#pragma once

#include <cstdint>

#include "common.h"

namespace lk {

// A prefix for attention: `parts` are the keys and the values of every layer, in this order.
struct PrefixSizes {
  int64_t tokens, parts, heads, head_dim, batch;
};

// out[part, b, head, t, :] = prefix[t, part, head, :] for every sample b.
struct PrefixKvParams {
  PrefixSizes sizes;
  FloatType type, prefix_type;
  const void* prefix;  // [tokens, parts * heads * head_dim]
  int64_t prefix_stride;
  void* out;  // [parts, batch, heads, tokens, head_dim], contiguous
};

// The gradient of one part: [batch, heads, tokens, head_dim].
struct PrefixGrad {
  const void* data;
  int64_t batch_stride, head_stride, token_stride;
};

// Parts whose gradients one launch sums: these stand in the parameters, and are not copied to be one tensor.
constexpr int kPrefixGrads = 32;

// grad_prefix[t, part, head, :] = the sum of grads[part][b, head, t, :] over the samples, in their order.
struct PrefixKvBackwardParams {
  PrefixGrad grads[kPrefixGrads];
  PrefixSizes sizes;  // parts: of this launch
  FloatType type, prefix_type;
  void* grad_prefix;  // at the first of these parts: [tokens, parts * heads * head_dim], rows `stride` apart
  int64_t grad_prefix_stride;
};

}  // namespace lk
