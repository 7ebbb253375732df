// A matrix as the copy engine of sm_90 is told it (TMA): opaque, as the driver encodes it. No CUDA.
#pragma once

#include <cstdint>

namespace lk {

struct alignas(64) TensorMap {
  uint64_t words[16];
};

}  // namespace lk
