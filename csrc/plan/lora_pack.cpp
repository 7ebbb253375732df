// Plans of lora_pack and its gradients.
#include "../launch/lora_pack.h"

#include "../launch/lora_problem.h"
#include "lora_linear_shared.h"

namespace lk {
namespace {

struct LoraPackFields {
  using Params = LoraPackParams;
  static_assert(kMaxMembers == 4);
  static constexpr std::array kFields = {LK_FIELD(members[0]),  LK_FIELD(members[1]), LK_FIELD(members[2]),
                                         LK_FIELD(members[3]),  LK_FIELD(count),      LK_FIELD(shrink_columns),
                                         LK_FIELD(base_columns)};
  static_assert(leaves_no_gap<Params>(kFields));
};

struct Problem {
  FloatType type;
  long long m, k;
  PackSizes sizes;
  int is_served;
  DeviceLimits device;
  Wanted wanted;
};

// Members' numbers from a list of them. False with a Python error.
bool read_sizes(PyObject* list, const char* name, int& count, int64_t (&numbers)[kMaxMembers]) {
  PyObject* const all = PySequence_Tuple(list);
  if (all == nullptr) return false;
  const Py_ssize_t size = PyTuple_Size(all);
  if (size < 1 || size > kMaxMembers || (count != 0 && size != count)) {
    PyErr_Format(PyExc_ValueError, "%s must be of 1 to %d members, and n and rank of as many", name, kMaxMembers);
  }
  count = static_cast<int>(size);
  for (Py_ssize_t i = 0; i < size && PyErr_Occurred() == nullptr; ++i)
    numbers[i] = PyLong_AsLongLong(PyTuple_GetItem(all, i));
  Py_DECREF(all);
  return PyErr_Occurred() == nullptr;
}

// False with a Python error.
bool parse(PyObject* args, PyObject* keywords, Problem& p) {
  const char* const names[] = {"dtype",      "m",        "n",    "k", "rank", "is_served", "sms", "shared_per_block",
                               "capability", "schedule", nullptr};
  const char *dtype, *schedule = "auto";
  PyObject *n, *rank;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "sLOLOpiii|s", const_cast<char**>(names), &dtype, &p.m, &n, &p.k,
                                   &rank, &p.is_served, &p.device.sms, &p.device.shared_per_block, &p.device.capability,
                                   &schedule) ||
      !parse_type("dtype", dtype, p.type, "tf32") || !is_positive("sms", p.device.sms) ||
      !read_sizes(n, "n", p.sizes.count, p.sizes.n) || !read_sizes(rank, "rank", p.sizes.count, p.sizes.rank)) {
    return false;
  }
  return parse_wanted(schedule, p.wanted);
}

// The launch for every y, of so many columns in all, or for dX; others follow. Or that members are better off alone.
PyObject* planned(const Problem& p, LoraRole role, int64_t columns, const std::vector<Plan>& others = {}) {
  const UsesCublas apart = one_by_one(p.m, columns, p.is_served != 0, p.device, p.wanted);
  if (apart.yes) return Py_BuildValue("{s:s,s:s}", "schedule", "one by one", "reason", apart.reason);
  const LoraPackConfig config = lora_pack_config(role, p.m, p.sizes, columns, p.device);
  const LoraLinearConfig& launch = config.launch;
  if (launch.blocks > INT32_MAX) return too_many_tiles();
  const KernelInfo kernel = with_element(
      p.type, [&]<class Element>(std::type_identity<Element>) { return describe_lora_pack<Element>(config.key); });
  PyObject* const ours =
      to_python({.schedule = name_of(launch.key.schedule),
                 .reason = std::string(launch.reason) + "; " + launch.tile_reason + "; " + apart.reason,
                 .kernel = kernel,
                 .blocks = launch.blocks,
                 .workspace_bytes = launch.counters * kBytesWord,
                 .params_size = sizeof(LoraPackParams),
                 .fields = LoraPackFields::kFields});
  if (others.empty()) return ours;
  return extended(list_of({ours}), others);
}

PyObject* plan_lora_pack(PyObject*, PyObject* args, PyObject* keywords) {
  Problem p{};
  if (!parse(args, keywords, p)) return nullptr;
  return planned(p, LoraRole::kForward, p.sizes.total_n());
}

PyObject* plan_lora_pack_backward(PyObject*, PyObject* args, PyObject* keywords) {
  Problem p{};
  if (!parse(args, keywords, p)) return nullptr;
  std::vector<Plan> others;
  for (int i = 0; i < p.sizes.count; ++i) {
    if (p.sizes.rank[i] == 0) continue;
    const LoraBackwardAccess access{Access::kWhole, Access::kWhole, true, true, true};
    const LoraGradsConfig grads = lora_grads_config(p.m, p.sizes.n[i], p.k, p.sizes.rank[i], 0, access, p.device);
    if (grads.blocks > INT32_MAX) return too_many_tiles();
    const KernelInfo kernel = with_element(
        p.type, [&]<class Element>(std::type_identity<Element>) { return describe_lora_grads<Element>(grads.key); });
    others.push_back(
        grads_plan(grads, "dA and dB of a member", kernel, sizeof(LoraGradsParams), LoraGradsFields::kFields));
  }
  return planned(p, LoraRole::kGradX, p.k, others);
}

std::vector<KernelInfo> kernels() {
  return of_every_type([]<class Element>() { return lora_pack_kernels<Element>(); });
}

const PlannedOp registered(
    {planner(
         "plan_lora_pack", plan_lora_pack,
         "The launch of lora_pack for a problem and a device, as a dict; n and rank are lists, one for each member."),
     planner("plan_lora_pack_backward", plan_lora_pack_backward, "The launches of its gradients, as a list.")},
    kernels);

}  // namespace
}  // namespace lk
