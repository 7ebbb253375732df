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
  // Gradient of x: where members' ranks begin if they lie one behind the other, each from where a fragment of
  // kFragmentBytes does; behind the last one, and in the places of those that there are not, where they end.
  int32_t first_rank[kMaxMembers + 1];

  static constexpr int kFragmentBytes = 32;
};

}  // namespace lk
