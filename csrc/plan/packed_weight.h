// The fields of a Params that begins with a packed weight.
#pragma once

#include "../params/packed_weight.h"
#include "plan.h"

#define LK_PACKED_WEIGHT_FIELDS                                                                                        \
  LK_FIELD(weight.data), LK_FIELD(weight.scales), LK_FIELD(weight.code), LK_FIELD(weight.scales2),                     \
      LK_FIELD(weight.code2), LK_FIELD(weight.offset), LK_FIELD(weight.n), LK_FIELD(weight.k), LK_FIELD(weight.block), \
      LK_FIELD(weight.block_rows), LK_FIELD(weight.block_columns), LK_FIELD(weight.layout)
