// The kernels of gated_activation as a table of functions, which kernels.h lists per instruction set.
#pragma once

#include "../params/gated_activation.h"

namespace lk::cpu {

struct GatedActivationKernels {
  // Elements [begin, end).
  void (*forward)(const GatedActivationParams&, int64_t begin, int64_t end);
  void (*backward)(const GatedActivationBackwardParams&, int64_t begin, int64_t end);
};

}  // namespace lk::cpu
