// The parameters of lora_pack's kernels.
#pragma once

#include "lora_linear.h"

namespace lk {

constexpr int kMaxMembers = 4;

// Each member's own, of one x, or of the gradients of one x: then y is one for all. m, counters and group_rows are the
// same in all; there is a flag for each block of rows and member.
struct LoraPackParams {
  LoraLinearParams members[kMaxMembers];
  int32_t count;
  int32_t shrink_columns, base_columns;  // tiles of all members in a block of rows
};

}  // namespace lk
