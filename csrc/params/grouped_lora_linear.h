// The parameters of grouped_lora_linear's kernels and of its gradients'.
#pragma once

#include "lora_linear.h"

namespace lk {

// Rows that lie group by group. Rows behind the last end belong to nobody.
struct RowGroups {
  const int32_t* ends;  // [count]: where each group's rows end, as the device alone knows
  int32_t count;
};

// The rows of x and y are those of all groups, and so is m; w, a, b and the bias are the first group's, and the next
// group has its own so many bytes further on, or the same.
struct GroupedLoraLinearParams {
  LoraLinearParams lora;
  RowGroups groups;
  int64_t w_step, a_step, b_step, bias_step;
  int32_t row_blocks;  // numbers that blocks of rows have
};

// Each group has its gradients behind those of the one before. split_rows: a block has no more rows of a group, and
// `splits` is not looked at. Of partials and counters there are those of 2 m / split_rows parts per tile.
struct GroupedLoraGradsParams {
  LoraGradsParams lora;
  RowGroups groups;
};

}  // namespace lk
