// Plans of multi_lora_linear and its gradients.
#include "../launch/multi_lora_linear.h"

#include "../launch/multi_lora_problem.h"
#include "lora_linear_shared.h"

namespace lk {
namespace {

#define LK_POOL_FIELDS                                                                                                \
  LK_FIELD(pools.ranks.data), LK_FIELD(pools.ranks.stride), LK_FIELD(pools.ranks.are_wide), LK_FIELD(pools.scalings), \
      LK_FIELD(pools.scalings_step), LK_FIELD(pools.a_step), LK_FIELD(pools.b_step), LK_FIELD(pools.count),           \
      LK_FIELD(pools.ranks_are_whole)

struct MultiLoraDecodeFields {
  using Params = MultiLoraDecodeParams;
  static_assert(offsetof(Params, lora) == 0);
  static constexpr auto kFields =
      joined(LoraLinearFields::kFields,
             std::array{LK_POOL_FIELDS, LK_FIELD(ids.data), LK_FIELD(ids.stride), LK_FIELD(ids.are_wide)});
  static_assert(leaves_no_gap<Params>(kFields));
};

struct MultiLoraOrderFields {
  using Params = MultiLoraOrderParams;
  static constexpr std::array kFields = {LK_FIELD(m),          LK_FIELD(count),        LK_FIELD(ids.data),
                                         LK_FIELD(ids.stride), LK_FIELD(ids.are_wide), LK_FIELD(rows),
                                         LK_FIELD(ends)};
  static_assert(leaves_no_gap<Params>(kFields));
};

struct MultiLoraBranchFields {
  using Params = MultiLoraBranchParams;
  static_assert(offsetof(Params, lora) == 0);
  static constexpr auto kFields =
      joined(LoraLinearFields::kFields,
             std::array{LK_FIELD(groups.ends), LK_FIELD(groups.count), LK_POOL_FIELDS, LK_FIELD(order)});
  static_assert(leaves_no_gap<Params>(kFields));
};

struct MultiLoraGradsFields {
  using Params = MultiLoraGradsParams;
  static_assert(offsetof(Params, lora) == 0);
  static constexpr auto kFields =
      joined(LoraGradsFields::kFields,
             std::array{LK_FIELD(groups.ends), LK_FIELD(groups.count), LK_POOL_FIELDS, LK_FIELD(order)});
  static_assert(leaves_no_gap<Params>(kFields));
};

struct Problem {
  FloatType type;
  long long m, n, k, rank, adapters;
  int w_is_whole, has_dropout;
  DeviceLimits device;
  Wanted wanted;

  int bytes() const { return element_bytes(type); }
  bool ranks_are_whole() const { return rank % chunk_elements(bytes()) == 0; }
};

// False with a Python error.
bool parse(PyObject* args, PyObject* keywords, Problem& p) {
  const char* const names[] = {"dtype",      "m",          "n",           "k",   "rank",
                               "adapters",   "w_is_whole", "has_dropout", "sms", "shared_per_block",
                               "capability", "schedule",   nullptr};
  const char *dtype, *schedule = "auto";
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "sLLLLLppiii|s", const_cast<char**>(names), &dtype, &p.m, &p.n, &p.k,
                                   &p.rank, &p.adapters, &p.w_is_whole, &p.has_dropout, &p.device.sms,
                                   &p.device.shared_per_block, &p.device.capability, &schedule) ||
      !parse_type("dtype", dtype, p.type, "tf32") || !is_positive("sms", p.device.sms)) {
    return false;
  }
  return parse_wanted(schedule, p.wanted);
}

Plan plan_of(const LoraLinearConfig& launch, const KernelInfo& kernel, size_t params_size,
             std::span<const Field> fields) {
  return {.schedule = name_of(launch.key.schedule),
          .reason = std::string(launch.reason) + "; " + launch.tile_reason,
          .kernel = kernel,
          .blocks = launch.blocks,
          .workspace_bytes = (launch.counters + launch.partials) * kBytesWord,
          .params_size = params_size,
          .fields = fields};
}

Plan branch_plan(const Problem& p, const MultiLoraConfig& config) {
  const KernelInfo kernel = with_element(p.type, [&]<class Element>(std::type_identity<Element>) {
    return describe_multi_lora_branch<Element>(config.launch.key);
  });
  return plan_of(config.launch, kernel, sizeof(MultiLoraBranchParams), MultiLoraBranchFields::kFields);
}

Plan order_plan(const Problem& p) {
  return {.schedule = "order",
          .reason = "each adapter's rows are looked up on the device",
          .kernel = describe_multi_lora_order(),
          .blocks = p.adapters,
          .workspace_bytes = (p.m + p.adapters) * kBytesWord,
          .params_size = sizeof(MultiLoraOrderParams),
          .fields = MultiLoraOrderFields::kFields};
}

constexpr const char* kWhyVendor = "one product over all rows, of which the branch is added to those that have one";

// Where all of these have grids.
PyObject* listed(const char* product_text, std::initializer_list<Plan> plans) {
  for (const Plan& plan : plans) {
    if (plan.blocks > INT32_MAX) return too_many_tiles();
  }
  return extended(list_of({product(product_text, kWhyVendor)}), plans);
}

PyObject* plan_multi_lora_linear(PyObject*, PyObject* args, PyObject* keywords) {
  Problem p;
  if (!parse(args, keywords, p)) return nullptr;
  if (p.wanted != Wanted::kCublas && decodes_adapters(p.m, p.w_is_whole != 0, p.has_dropout != 0)) {
    const LoraLinearConfig decode = multi_lora_decode_config(p.m, p.n, p.k, p.rank, p.bytes(), p.device);
    if (decode.blocks > INT32_MAX) return too_many_tiles();
    const KernelInfo kernel = with_element(p.type, [&]<class Element>(std::type_identity<Element>) {
      return describe_multi_lora_decode<Element>(decode.key);
    });
    return to_python(plan_of(decode, kernel, sizeof(MultiLoraDecodeParams), MultiLoraDecodeFields::kFields));
  }
  return listed(
      "y = x wT + bias",
      {order_plan(p),
       branch_plan(p, multi_lora_shrink_config(LoraRole::kForward, p.m, p.k, p.rank, p.adapters, p.bytes(), p.device)),
       branch_plan(p, multi_lora_expand_config(LoraRole::kForward, p.m, p.n, p.adapters))});
}

PyObject* plan_multi_lora_linear_backward(PyObject*, PyObject* args, PyObject* keywords) {
  Problem p;
  if (!parse(args, keywords, p)) return nullptr;
  const LoraGradsConfig grads =
      multi_lora_grads_config(p.m, p.n, p.k, p.rank, p.adapters, p.ranks_are_whole(), p.device);
  const KernelInfo kernel = with_element(p.type, [&]<class Element>(std::type_identity<Element>) {
    return describe_multi_lora_grads<Element>(grads.key);
  });
  return listed(
      "dX = dY W",
      {order_plan(p),
       branch_plan(p, multi_lora_shrink_config(LoraRole::kGradX, p.m, p.n, p.rank, p.adapters, p.bytes(), p.device)),
       branch_plan(p, multi_lora_expand_config(LoraRole::kGradX, p.m, p.k, p.adapters)),
       grads_plan(grads, "a block sums rows of one adapter; those of one with many rows are shared out", kernel,
                  sizeof(MultiLoraGradsParams), MultiLoraGradsFields::kFields)});
}

std::vector<KernelInfo> kernels() {
  std::vector<KernelInfo> all = of_every_type([]<class Element>() { return multi_lora_kernels<Element>(); });
  all.insert(all.begin(), describe_multi_lora_order());
  return all;
}

const PlannedOp registered(
    {planner("plan_multi_lora_linear", plan_multi_lora_linear,
             "The launch of multi_lora_linear, as a dict, or a list of the vendor's product and its launches."),
     planner("plan_multi_lora_linear_backward", plan_multi_lora_linear_backward,
             "The product and the launches of its gradients, as a list.")},
    kernels);

}  // namespace
}  // namespace lk
