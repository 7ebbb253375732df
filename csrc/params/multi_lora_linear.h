// The parameters of multi_lora_linear's kernels and of its gradients'.
#pragma once

#include "grouped_lora_linear.h"

namespace lk {

// Integers of 32 or 64 bits, `stride` elements apart. Null: there are none.
struct Integers {
  const void* data;
  int64_t stride;
  bool are_wide;
};

// Pools of adapters. Those of `a` and `b`, as a launch has them, are the first one's; the next has its own so many
// bytes further on, and uses so many ranks of them.
struct AdapterPools {
  Integers ranks;         // null: all of them use the launch's
  const float* scalings;  // each times the launch's; null: all have that
  int64_t scalings_step;
  int64_t a_step, b_step;
  int32_t count;
  bool ranks_are_whole;  // rows of as many elements as pools have ranks consist of chunks
};

// Each row of x has the adapter of its id, or none where that is no adapter's number.
struct MultiLoraDecodeParams {
  LoraLinearParams lora;
  AdapterPools pools;
  Integers ids;  // [m]
};

// The rows of each adapter, in their order, adapter by adapter: `rows`, and where they end there.
struct MultiLoraOrderParams {
  int32_t m, count;
  Integers ids;
  int32_t* rows;  // [m], of which those behind the last end are not written
  int32_t* ends;  // [count]
};

// s, or s' = dY B; or the branch, which is added to y, or dX.
struct MultiLoraBranchParams {
  LoraLinearParams lora;
  RowGroups groups;
  AdapterPools pools;
  const int32_t* order;  // the rows of groups
};

struct MultiLoraGradsParams {
  LoraGradsParams lora;
  RowGroups groups;
  AdapterPools pools;
  const int32_t* order;
};

}  // namespace lk
