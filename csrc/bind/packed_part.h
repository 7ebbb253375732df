// What is checked of every part of a packed weight.
#pragma once

#include "../params/packed_weight.h"
#include "aten.h"

namespace lk {

// data: the part that others have to be beside.
inline void check_packed_part(const Tensor& data, const Tensor& part, ScalarType dtype, int64_t count,
                              const char* message) {
  STD_TORCH_CHECK(part.scalar_type() == dtype && part.numel() == count && part.is_contiguous(),
                  "packed weight: ", message);
  STD_TORCH_CHECK(is_beside(data, part), "packed weight: its parts must be on one device");
}

}  // namespace lk
