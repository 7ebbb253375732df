// dropout_mask's parameters.
#pragma once

#include <cstdint>

#include "../philox.h"

namespace lk {

// keep[m, k] = whether element (m, k) of a [rows, columns] matrix survives dropout.
// The seed stays where it is: on a GPU, reading it on the host would wait for the device.
struct DropoutMaskParams {
  bool* keep;
  int64_t rows, columns;
  const int64_t* seed;
  uint32_t threshold;
};

}  // namespace lk
