// Plans of cross_entropy_rows.
#include "../launch/cross_entropy_rows.h"

#include "plan.h"

namespace lk {
namespace {

struct CrossEntropyFields {
  using Params = CrossEntropyParams;
  static constexpr std::array kFields = {
      LK_FIELD(logits),          LK_FIELD(stride),  LK_FIELD(labels),      LK_FIELD(grad_losses),
      LK_FIELD(losses),          LK_FIELD(rows),    LK_FIELD(columns),     LK_FIELD(ignore_index),
      LK_FIELD(label_smoothing), LK_FIELD(softcap), LK_FIELD(logit_scale), LK_FIELD(grad_type),
  };
  static_assert(lists_all<Params>(kFields));
};

PyObject* plan_cross_entropy_rows(PyObject*, PyObject* args, PyObject* keywords) {
  const char* const names[] = {"dtype", "rows", "columns", "sms", "shared_per_block", nullptr};
  const char* dtype;
  long long rows, columns;
  int sms, shared_per_block;
  FloatType type;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "sLLii", const_cast<char**>(names), &dtype, &rows, &columns, &sms,
                                   &shared_per_block) ||
      !parse_type("dtype", dtype, type)) {
    return nullptr;
  }
  const CrossEntropyConfig config = cross_entropy_config(rows, columns % chunk_elements(sizeof(float)) == 0);
  if (config.blocks > INT32_MAX) return too_many_tiles();
  return to_python({.schedule = "row per block",
                    .reason = config.aligned ? "a thread reads 16 bytes of logits at a time"
                                             : "rows of logits do not begin at 16 bytes: a thread reads one at a time",
                    .kernel = describe_cross_entropy_rows(type, config.aligned),
                    .blocks = config.blocks,
                    .workspace_bytes = 0,
                    .params_size = sizeof(CrossEntropyParams),
                    .fields = CrossEntropyFields::kFields});
}

const PlannedOp registered({planner("plan_cross_entropy_rows", plan_cross_entropy_rows,
                                    "The launch of cross_entropy_rows.")},
                           cross_entropy_rows_kernels);

}  // namespace
}  // namespace lk
