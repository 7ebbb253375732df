// prefix_kv and its gradient: functions over ranges, so that the caller brings the threads.
#pragma once

#include "../params/prefix_kv.h"

namespace lk::cpu {

// The keys or values of heads [begin, end), counted over parts * heads.
void prefix_heads(const PrefixKvParams& p, int64_t begin, int64_t end);

// Rows [begin, end) of the gradient, counted over parts * heads * tokens, as those of grads lie.
void prefix_grad_rows(const PrefixKvBackwardParams& p, int64_t begin, int64_t end);

}  // namespace lk::cpu
