// dropout_mask: one kernel, and nothing to plan.
#include "../launch/dropout_mask.h"

#include "plan.h"

namespace lk {
namespace {

const PlannedOp registered({}, [] { return std::vector{describe_dropout_mask()}; });

}  // namespace
}  // namespace lk
