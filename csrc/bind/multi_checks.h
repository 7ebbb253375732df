// What the kernels of multi_lora_linear take for granted about their operands. What ids and ranks are is looked at
// where they are read.
#pragma once

#include "lora_checks.h"

namespace lk {

inline void check_ids(const Tensor& adapter_ids, int64_t rows) {
  STD_TORCH_CHECK(adapter_ids.dim() == 1 && adapter_ids.size(0) == rows && is_integer(adapter_ids),
                  "adapter_ids must be one integer for each row of x");
}

// Who has which of so many adapters, and how.
inline void check_who(const Tensor& x, int64_t adapters, const Tensor& adapter_ids, const std::optional<Tensor>& ranks,
                      const std::optional<Tensor>& scalings) {
  check_ids(adapter_ids, rows_of(x));
  STD_TORCH_CHECK(is_beside(x, adapter_ids), "adapter_ids must be on x's device");
  STD_TORCH_CHECK(!ranks || (ranks->dim() == 1 && ranks->size(0) == adapters && is_integer(*ranks)),
                  "ranks must be one integer for each adapter");
  STD_TORCH_CHECK(is_beside(x, ranks), "ranks must be on x's device");
  STD_TORCH_CHECK(!scalings || (scalings->dim() == 1 && scalings->size(0) == adapters),
                  "scalings must be one number for each adapter");
  STD_TORCH_CHECK(is_beside(x, scalings), "scalings must be on x's device");
}

inline void check_multi_lora_shrink(const Tensor& x, const Tensor& lora_A, const Tensor& adapter_ids,
                                    const std::optional<Tensor>& ranks) {
  STD_TORCH_CHECK(
      x.dim() > 0 && lora_A.dim() == 3 && lora_A.size(0) >= 1 && lora_A.size(1) >= 1 &&
          lora_A.size(2) == x.size(x.dim() - 1),
      "x must be [..., k] and lora_A [adapters, rank, k], with at least one adapter and a rank of at least 1");
  STD_TORCH_CHECK(is_beside(x, lora_A), "lora_A must be on x's device");
  check_who(x, lora_A.size(0), adapter_ids, ranks, std::nullopt);
}

inline void check_multi_lora_expand(const Tensor& y, const Tensor& s, const Tensor& lora_B, const Tensor& adapter_ids,
                                    const std::optional<Tensor>& ranks, const std::optional<Tensor>& scalings) {
  STD_TORCH_CHECK(
      y.dim() > 0 && lora_B.dim() == 3 && lora_B.size(0) >= 1 && lora_B.size(2) >= 1 &&
          lora_B.size(1) == y.size(y.dim() - 1),
      "y must be [..., n] and lora_B [adapters, n, rank], with at least one adapter and a rank of at least 1");
  STD_TORCH_CHECK(s.dim() == y.dim() && s.size(s.dim() - 1) == lora_B.size(2) && rows_of(s) == rows_of(y),
                  "s must be [..., rank], of y's leading sizes");
  STD_TORCH_CHECK(s.scalar_type() == y.scalar_type(), "s must have y's dtype");
  STD_TORCH_CHECK(is_beside(y, s), "s must be on y's device");
  STD_TORCH_CHECK(is_beside(y, lora_B), "lora_B must be on y's device");
  check_who(y, lora_B.size(0), adapter_ids, ranks, scalings);
}

inline void check_multi_lora_linear(const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                                    const Tensor& adapter_ids, const std::optional<Tensor>& ranks,
                                    const std::optional<Tensor>& scalings, const std::optional<Tensor>& bias,
                                    const std::optional<Tensor>& seed) {
  check_frozen_linear(x, weight, bias);
  const int64_t n = weight.size(0), k = weight.size(1);
  STD_TORCH_CHECK(lora_A.dim() == 3 && lora_A.size(0) >= 1 && lora_A.size(1) >= 1 && lora_A.size(2) == k,
                  "lora_A must be [adapters, rank, k], with at least one adapter and a rank of at least 1");
  const int64_t adapters = lora_A.size(0);
  STD_TORCH_CHECK(
      lora_B.dim() == 3 && lora_B.size(0) == adapters && lora_B.size(1) == n && lora_B.size(2) == lora_A.size(1),
      "lora_B must be [adapters, n, rank]");
  STD_TORCH_CHECK(lora_A.scalar_type() == lora_B.scalar_type(), "lora_B must have lora_A's dtype");
  STD_TORCH_CHECK(is_beside(x, lora_A), "lora_A must be on x's device");
  STD_TORCH_CHECK(is_beside(x, lora_B), "lora_B must be on x's device");
  check_who(x, adapters, adapter_ids, ranks, scalings);
  if (seed) check_seed(*seed);
  STD_TORCH_CHECK(is_beside(x, seed), "seed must be on x's device");
}

}  // namespace lk
