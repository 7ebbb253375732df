// Plans of gated_activation and its gradients.
#include "../launch/gated_activation.h"

#include "plan.h"

namespace lk {
namespace {

struct GatedActivationFields {
  using Params = GatedActivationParams;
  static constexpr std::array kFields = {LK_FIELD(type), LK_FIELD(activation), LK_FIELD(gate),
                                         LK_FIELD(up),   LK_FIELD(h),          LK_FIELD(count)};
  static_assert(leaves_no_gap<Params>(kFields));
};

struct GatedActivationBackwardFields {
  using Params = GatedActivationBackwardParams;
  static constexpr std::array kFields = {LK_FIELD(type), LK_FIELD(activation), LK_FIELD(grad_h),  LK_FIELD(gate),
                                         LK_FIELD(up),   LK_FIELD(grad_gate),  LK_FIELD(grad_up), LK_FIELD(count)};
  static_assert(leaves_no_gap<Params>(kFields));
};

struct GatedProblem {
  FloatType type;
  GatedActivationConfig config;
};

// False with a Python error.
bool parse(PyObject* args, PyObject* keywords, GatedProblem& p) {
  const char* const names[] = {"dtype", "count", "aligned", "sms", "shared_per_block", nullptr};
  const char* dtype;
  long long count;
  int aligned, sms, shared_per_block;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "sLpii", const_cast<char**>(names), &dtype, &count, &aligned, &sms,
                                   &shared_per_block) ||
      !parse_type("dtype", dtype, p.type)) {
    return false;
  }
  p.config = gated_config(p.type, count, aligned != 0);
  if (p.config.blocks <= INT32_MAX) return true;
  too_many_tiles();
  return false;
}

constexpr const char* kReason = "a thread has 16 bytes of each tensor, or, where these do not begin at 16, one element";

PyObject* plan_gated_activation(PyObject*, PyObject* args, PyObject* keywords) {
  GatedProblem p;
  if (!parse(args, keywords, p)) return nullptr;
  return to_python({.schedule = "elementwise",
                    .reason = kReason,
                    .kernel = describe_gated_activation(p.type, p.config.aligned),
                    .blocks = p.config.blocks,
                    .workspace_bytes = 0,
                    .params_size = sizeof(GatedActivationParams),
                    .fields = GatedActivationFields::kFields});
}

PyObject* plan_gated_activation_backward(PyObject*, PyObject* args, PyObject* keywords) {
  GatedProblem p;
  if (!parse(args, keywords, p)) return nullptr;
  return to_python({.schedule = "elementwise",
                    .reason = kReason,
                    .kernel = describe_gated_activation_backward(p.type, p.config.aligned),
                    .blocks = p.config.blocks,
                    .workspace_bytes = 0,
                    .params_size = sizeof(GatedActivationBackwardParams),
                    .fields = GatedActivationBackwardFields::kFields});
}

const PlannedOp registered({planner("plan_gated_activation", plan_gated_activation, "The launch of gated_activation."),
                            planner("plan_gated_activation_backward", plan_gated_activation_backward,
                                    "The launch of its gradients.")},
                           gated_activation_kernels);

}  // namespace
}  // namespace lk
