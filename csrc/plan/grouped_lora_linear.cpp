// Plans of grouped_lora_linear and its gradients.
#include "../launch/grouped_lora_linear.h"

#include "../launch/grouped_lora_problem.h"
#include "lora_linear_shared.h"

namespace lk {
namespace {

struct GroupedLoraLinearFields {
  using Params = GroupedLoraLinearParams;
  static_assert(offsetof(Params, lora) == 0);
  static constexpr auto kFields =
      joined(LoraLinearFields::kFields,
             std::array{LK_FIELD(groups.ends), LK_FIELD(groups.count), LK_FIELD(w_step), LK_FIELD(a_step),
                        LK_FIELD(b_step), LK_FIELD(bias_step), LK_FIELD(row_blocks)});
  static_assert(leaves_no_gap<Params>(kFields));
};

struct GroupedLoraGradsFields {
  using Params = GroupedLoraGradsParams;
  static_assert(offsetof(Params, lora) == 0);
  static constexpr auto kFields =
      joined(LoraGradsFields::kFields, std::array{LK_FIELD(groups.ends), LK_FIELD(groups.count)});
  static_assert(leaves_no_gap<Params>(kFields));
};

struct Problem {
  FloatType type;
  long long m, n, k, rank, groups;
  int is_shared, in_columns;
  DeviceLimits device;
  Wanted wanted;
};

// False with a Python error.
bool parse(PyObject* args, PyObject* keywords, Problem& p) {
  const char* const names[] = {"dtype",      "m",         "n",          "k",   "rank",
                               "groups",     "is_shared", "in_columns", "sms", "shared_per_block",
                               "capability", "schedule",  nullptr};
  const char *dtype, *schedule = "auto";
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "sLLLLLppiii|s", const_cast<char**>(names), &dtype, &p.m, &p.n, &p.k,
                                   &p.rank, &p.groups, &p.is_shared, &p.in_columns, &p.device.sms,
                                   &p.device.shared_per_block, &p.device.capability, &schedule) ||
      !parse_type("dtype", dtype, p.type, "tf32") || !is_positive("groups", p.groups) ||
      !is_positive("sms", p.device.sms)) {
    return false;
  }
  return parse_wanted(schedule, p.wanted);
}

// The launch for y, or dX, of so many columns, behind the vendor's product where that is made first. Others follow.
PyObject* planned(const Problem& p, LoraRole role, int64_t columns, const char* text,
                  const std::vector<Plan>& others = {}) {
  const GroupedProduct product_of{.is_shared = p.is_shared != 0, .has_vendor = p.type == FloatType::kBFloat16};
  const UsesCublas vendor = grouped_uses_vendor(p.m, columns, p.groups, product_of, p.device, p.wanted);
  const GroupedLoraConfig config =
      grouped_lora_config(role, p.m, columns, p.rank, p.groups, p.in_columns == 0, vendor.yes, p.device);
  const LoraLinearConfig& launch = config.launch;
  if (launch.blocks > INT32_MAX) return too_many_tiles();
  const KernelInfo kernel = with_element(
      p.type, [&]<class Element>(std::type_identity<Element>) { return describe_grouped_lora<Element>(config.key); });
  PyObject* const ours =
      to_python({.schedule = name_of(launch.key.schedule),
                 .reason = std::string(launch.reason) + "; " + launch.tile_reason + "; " + vendor.reason,
                 .kernel = kernel,
                 .blocks = launch.blocks,
                 .workspace_bytes = launch.counters * kBytesWord,
                 .params_size = sizeof(GroupedLoraLinearParams),
                 .fields = GroupedLoraLinearFields::kFields});
  if (!vendor.yes && others.empty()) return ours;
  return extended(vendor.yes ? list_of({product(text, vendor.reason), ours}) : list_of({ours}), others);
}

PyObject* plan_grouped_lora_linear(PyObject*, PyObject* args, PyObject* keywords) {
  Problem p;
  if (!parse(args, keywords, p)) return nullptr;
  return planned(p, LoraRole::kForward, p.n, "y = x wT");
}

PyObject* plan_grouped_lora_linear_backward(PyObject*, PyObject* args, PyObject* keywords) {
  Problem p;
  if (!parse(args, keywords, p)) return nullptr;
  const LoraGradsConfig grads = grouped_lora_grads_config(p.m, p.n, p.k, p.rank, p.groups, p.device);
  if (grads.blocks > INT32_MAX) return too_many_tiles();
  const KernelInfo kernel = with_element(p.type, [&]<class Element>(std::type_identity<Element>) {
    return describe_grouped_lora_grads<Element>(grads.key);
  });
  return planned(p, LoraRole::kGradX, p.k, "dX = dY W",
                 {grads_plan(grads, "a block sums rows of one group; those of a large one are shared out", kernel,
                             sizeof(GroupedLoraGradsParams), GroupedLoraGradsFields::kFields)});
}

std::vector<KernelInfo> kernels() {
  return of_every_type([]<class Element>() { return grouped_lora_kernels<Element>(); });
}

const PlannedOp registered(
    {planner("plan_grouped_lora_linear", plan_grouped_lora_linear,
             "The launch of grouped_lora_linear, as a dict, or a list of it and of the vendor's product."),
     planner("plan_grouped_lora_linear_backward", plan_grouped_lora_linear_backward,
             "The launches and the product of its gradients, as a list.")},
    kernels);

}  // namespace
}  // namespace lk
