// Plans of grouped_lora_linear and its gradients.
#include "../launch/grouped_lora_linear.h"

#include "../launch/grouped_lora_problem.h"
#include "lora_linear_fields.h"

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
  int in_columns;
  DeviceLimits device;
};

// False with a Python error.
bool parse(PyObject* args, PyObject* keywords, Problem& p) {
  const char* const names[] = {
      "dtype", "m", "n", "k", "rank", "groups", "in_columns", "sms", "shared_per_block", "capability", nullptr};
  const char* dtype;
  return PyArg_ParseTupleAndKeywords(args, keywords, "sLLLLLpiii", const_cast<char**>(names), &dtype, &p.m, &p.n, &p.k,
                                     &p.rank, &p.groups, &p.in_columns, &p.device.sms, &p.device.shared_per_block,
                                     &p.device.capability) != 0 &&
         parse_type("dtype", dtype, p.type, "tf32");
}

PyObject* planned(const GroupedLoraConfig& config, const KernelInfo& kernel) {
  const LoraLinearConfig& launch = config.launch;
  return to_python({.schedule = name_of(launch.key.schedule),
                    .reason = std::string(launch.reason) + "; " + launch.tile_reason,
                    .kernel = kernel,
                    .blocks = launch.blocks,
                    .workspace_bytes = launch.counters * kBytesWord,
                    .params_size = sizeof(GroupedLoraLinearParams),
                    .fields = GroupedLoraLinearFields::kFields});
}

PyObject* plan_grouped_lora_linear(PyObject*, PyObject* args, PyObject* keywords) {
  Problem p;
  if (!parse(args, keywords, p)) return nullptr;
  const GroupedLoraConfig config =
      grouped_lora_config(LoraRole::kForward, p.m, p.n, p.rank, p.groups, p.in_columns == 0, p.device);
  if (config.launch.blocks > INT32_MAX) return too_many_tiles();
  return with_element(p.type, [&]<class Element>(std::type_identity<Element>) {
    return planned(config, describe_grouped_lora<Element>(config.key));
  });
}

// A list of the launches.
PyObject* plan_grouped_lora_linear_backward(PyObject*, PyObject* args, PyObject* keywords) {
  Problem p;
  if (!parse(args, keywords, p)) return nullptr;
  const GroupedLoraConfig config =
      grouped_lora_config(LoraRole::kGradX, p.m, p.k, p.rank, p.groups, p.in_columns == 0, p.device);
  const LoraGradsConfig grads = grouped_lora_grads_config(p.m, p.n, p.k, p.rank, p.groups, p.device);
  if (config.launch.blocks > INT32_MAX || grads.blocks > INT32_MAX) return too_many_tiles();
  return with_element(p.type, [&]<class Element>(std::type_identity<Element>) {
    return list_of({planned(config, describe_grouped_lora<Element>(config.key)),
                    to_python({.schedule = "split rows",
                               .reason = "a block sums rows of one group; those of a large one are shared out",
                               .kernel = describe_grouped_lora_grads<Element>(grads.key),
                               .blocks = grads.blocks,
                               .workspace_bytes = (grads.counters + grads.partials) * kBytesWord,
                               .params_size = sizeof(GroupedLoraGradsParams),
                               .fields = GroupedLoraGradsFields::kFields})});
  });
}

std::vector<KernelInfo> kernels() {
  std::vector<KernelInfo> all;
  for (const FloatType type : {FloatType::kBFloat16, FloatType::kFloat16, FloatType::kFloat32}) {
    with_element(type, [&]<class Element>(std::type_identity<Element>) {
      const auto some = grouped_lora_kernels<Element>();
      all.insert(all.end(), some.begin(), some.end());
    });
  }
  return all;
}

const PlannedOp registered({planner("plan_grouped_lora_linear", plan_grouped_lora_linear,
                                    "The launch of grouped_lora_linear, as a dict."),
                            planner("plan_grouped_lora_linear_backward", plan_grouped_lora_linear_backward,
                                    "The launches of its gradients, as a list.")},
                           kernels);

}  // namespace
}  // namespace lk
