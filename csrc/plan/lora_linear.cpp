// Plans of lora_linear and its gradients.
#include "../launch/lora_linear.h"

#include "../launch/lora_linear_wgmma.h"
#include "../launch/lora_problem.h"
#include "../launch/lora_wgmma_boxes.h"
#include "lora_linear_shared.h"

namespace lk {
namespace {

// What the problem of an op, the device and who chooses come as.
struct Problem {
  LoraProblem lora;
  DeviceLimits device;
  Wanted wanted;
};

// Where tensors begin that are never read.
constexpr int64_t kSeed = 0;
float parts_of_grad_b;
const void* somewhere(bool aligned, FloatType type) {
  return reinterpret_cast<const void*>(static_cast<uintptr_t>(aligned ? 0 : element_bytes(type)));
}

// False with a Python error.
bool parse(PyObject* args, PyObject* keywords, Problem& p) {
  const char* const names[] = {
      "dtype",      "m",        "n",    "k", "rank", "rows_aligned", "has_dropout", "sms", "shared_per_block",
      "capability", "schedule", nullptr};
  const char *dtype, *schedule = "auto";
  long long m, n, k, rank;
  int rows_aligned, has_dropout;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "sLLLLppiii|s", const_cast<char**>(names), &dtype, &m, &n, &k, &rank,
                                   &rows_aligned, &has_dropout, &p.device.sms, &p.device.shared_per_block,
                                   &p.device.capability, &schedule)) {
    return false;
  }
  FloatType type;
  if (!parse_type("dtype", dtype, type, "tf32") || !is_positive("sms", p.device.sms)) return false;
  const auto matrix = [&](int64_t rows, int64_t columns) {
    return MatrixRef{somewhere(rows_aligned != 0, type), columns, rows, columns, type};
  };
  p.lora = {.x = matrix(m, k), .w = matrix(n, k), .a = matrix(rank, k), .b = matrix(n, rank)};
  if (has_dropout != 0) p.lora.seed = &kSeed;
  p.device.encodes_tensor_maps = kHasWgmma<BFloat16>;  // the driver of the device is not asked
  return parse_wanted(schedule, p.wanted);
}

Plan plan_of(const LoraLinearConfig& config, const KernelInfo& kernel, const char* why, int64_t more_words = 0) {
  return {.schedule = name_of(config.key.schedule),
          .reason = std::string(config.reason) + "; " + config.tile_reason + "; " + why,
          .kernel = kernel,
          .blocks = config.blocks,
          .workspace_bytes = (config.counters + config.partials + more_words) * kBytesWord,
          .params_size = sizeof(LoraLinearParams),
          .fields = LoraLinearFields::kFields};
}

struct LoraWgmmaFields {
  using Params = LoraWgmmaParams;
  static constexpr std::array kMaps = {Field{"map of x", offsetof(Params, x), sizeof(Params::x)},
                                       Field{"map of w", offsetof(Params, w), sizeof(Params::w)},
                                       Field{"map of b", offsetof(Params, b), sizeof(Params::b)},
                                       Field{"map of s", offsetof(Params, s), sizeof(Params::s)},
                                       Field{"map of y", offsetof(Params, y), sizeof(Params::y)},
                                       Field{"map of a", offsetof(Params, a), sizeof(Params::a)},
                                       Field{"map of saved s", offsetof(Params, saved_s), sizeof(Params::saved_s)}};
  static constexpr std::array kRounded = {Field{"rounded a", offsetof(Params, rounded_a), sizeof(Params::rounded_a)},
                                          Field{"rounded b", offsetof(Params, rounded_b), sizeof(Params::rounded_b)}};
  static constexpr std::array kFields = joined(joined(LoraLinearFields::kFields, kRounded), kMaps);
  static_assert(offsetof(Params, lora) == 0 &&
                sizeof(Params) == kMaps.front().offset + kMaps.size() * sizeof(TensorMap));
};

// What the copy engine is told of a matrix; the dimension whose elements are neighbours comes first.
PyObject* to_python(const Boxes& boxes) {
  return Py_BuildValue("{s:s,s:[L,L],s:[L],s:[i,i],s:i,s:s}",                                              //
                       "tensor", boxes.tensor,                                                             //
                       "dims", static_cast<long long>(boxes.columns), static_cast<long long>(boxes.rows),  //
                       "strides_in_bytes", static_cast<long long>(boxes.stride * Boxes::kElementBytes),    //
                       "box", boxes.box_columns, boxes.box_rows,                                           //
                       "swizzle_bytes", boxes.swizzle_bytes(),                                             //
                       "why", boxes.why);
}

// Of the forward, or of dX, whose matrices `params` has.
template <class Element>
PyObject* planned_wgmma(const LoraLinearParams& params, const LoraLinearConfig& config, const char* why,
                        int64_t more_words = 0) {
  if constexpr (kHasWgmma<Element>) {
    Plan plan = plan_of(config, describe_lora_linear_wgmma<Element>(config.key), why, more_words);
    plan.params_size = sizeof(LoraWgmmaParams);
    plan.fields = LoraWgmmaFields::kFields;
    PyObject* planned = to_python(plan);
    PyObject* maps = PyList_New(0);
    for (const Boxes& boxes : wgmma_boxes(params, config.key)) {
      if (!append(maps, to_python(boxes))) Py_CLEAR(maps);
    }
    const bool is_whole = planned != nullptr && maps != nullptr && PyDict_SetItemString(planned, "maps", maps) == 0;
    Py_XDECREF(maps);
    if (!is_whole) Py_CLEAR(planned);
    return planned;
  } else {
    PyErr_SetString(PyExc_RuntimeError, "this build has no kernels of wgmma");
    return nullptr;
  }
}

// One launch, or a list of them.
PyObject* plan_lora_linear(PyObject*, PyObject* args, PyObject* keywords) {
  Problem p;
  if (!parse(args, keywords, p)) return nullptr;
  const LoraForwardConfig config = lora_forward_config(p.lora, p.device, p.wanted);
  if (config.launch.blocks > INT32_MAX || config.expand.blocks > INT32_MAX) return too_many_tiles();
  return with_element(p.lora.x.type, [&]<class Element>(std::type_identity<Element>) -> PyObject* {
    const auto planned = [&](const LoraLinearConfig& launch) {
      return to_python(plan_of(launch, describe_lora_linear<Element>(launch.key), config.cublas.reason));
    };
    if (config.launch.key.schedule == Schedule::kWgmma) {
      const LoraLinearParams params = forward_params(p.lora, {nullptr, p.lora.n()}, nullptr, config.launch, {});
      return planned_wgmma<Element>(params, config.launch, config.cublas.reason);
    }
    if (!config.cublas.yes) return planned(config.launch);
    return list_of({config.vendor_makes_s ? product("s = x aT", config.cublas.reason) : planned(config.launch),
                    planned(config.expand), product("y += x wT", config.cublas.reason)});
  });
}

// A list of the launches.
PyObject* plan_lora_linear_backward(PyObject*, PyObject* args, PyObject* keywords) {
  Problem p;
  if (!parse(args, keywords, p)) return nullptr;
  const LoraProblem& forward = p.lora;
  const LoraBackwardProblem problem{.forward = forward,
                                    .grad_y = {forward.w.data, forward.n(), forward.m(), forward.n(), forward.x.type},
                                    .s = {forward.w.data, forward.rank(), forward.m(), forward.rank(), forward.x.type}};
  const LoraBackwardConfig config = lora_backward_config(problem, p.device, p.wanted);
  if (config.grad_x.blocks > INT32_MAX || config.expand.blocks > INT32_MAX || config.grads.blocks > INT32_MAX) {
    return too_many_tiles();
  }
  return with_element(forward.x.type, [&]<class Element>(std::type_identity<Element>) -> PyObject* {
    const char* const why = config.parts_of_grad_b > 0
                                ? "parts of dB are there and only summed"
                                : "dY is read again: it was not in shared memory, or parts of dB would be larger";
    const Plan last = grads_plan(config.grads, why, describe_lora_grads<Element>(config.grads.key),
                                 sizeof(LoraGradsParams), LoraGradsFields::kFields);
    const auto planned = [&](const LoraLinearConfig& launch, int64_t more_words) {
      return to_python(plan_of(launch, describe_lora_grad_x<Element>(launch.key), config.cublas.reason, more_words));
    };
    if (config.grad_x.key.schedule == Schedule::kWgmma) {
      const LoraBackwardWorkspace workspace{.partial_grad_b = &parts_of_grad_b};
      const LoraLinearParams params = grad_x_params(problem, {nullptr, forward.k()}, config.grad_x, config, workspace);
      return list_of({planned_wgmma<Element>(params, config.grad_x, config.cublas.reason, config.partial_grad_b),
                      to_python(last)});
    }
    if (!config.cublas.yes) return list_of({planned(config.grad_x, config.partial_grad_b), to_python(last)});
    return list_of({product("s' = dY B", config.cublas.reason), planned(config.expand, 0),
                    product("dX += dY W", config.cublas.reason), to_python(last)});
  });
}

std::vector<KernelInfo> kernels() {
  return of_every_type([]<class Element>() {
    std::vector<KernelInfo> all = lora_linear_kernels<Element>();
    const std::vector<KernelInfo> backward = lora_backward_kernels<Element>();
    all.insert(all.end(), backward.begin(), backward.end());
    if constexpr (kHasWgmma<Element>) {
      const std::vector<KernelInfo> wgmma = lora_linear_wgmma_kernels<Element>();
      all.insert(all.end(), wgmma.begin(), wgmma.end());
    }
    return all;
  });
}

const PlannedOp registered(
    {planner("plan_lora_linear", plan_lora_linear,
             "The launch of lora_linear for a problem and a device, as a dict, or a list of them and of products."),
     planner("plan_lora_linear_backward", plan_lora_linear_backward, "The launches and products of its gradients.")},
    kernels);

}  // namespace
}  // namespace lk
