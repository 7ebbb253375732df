// Plans of prefix_kv and its gradient.
#include "../launch/prefix_kv.h"

#include <algorithm>

#include "plan.h"

namespace lk {
namespace {

#define LK_PREFIX_FIELDS                                                                          \
  LK_FIELD(sizes.tokens), LK_FIELD(sizes.parts), LK_FIELD(sizes.heads), LK_FIELD(sizes.head_dim), \
      LK_FIELD(sizes.batch), LK_FIELD(type), LK_FIELD(prefix_type)

struct PrefixKvFields {
  using Params = PrefixKvParams;
  static constexpr std::array kFields = {
      LK_PREFIX_FIELDS,
      LK_FIELD(prefix),
      LK_FIELD(prefix_stride),
      LK_FIELD(out),
  };
  static_assert(leaves_no_gap<Params>(kFields));
};

struct PrefixKvBackwardFields {
  using Params = PrefixKvBackwardParams;
  static constexpr std::array kFields = {
      LK_FIELD(grads),
      LK_PREFIX_FIELDS,
      LK_FIELD(grad_prefix),
      LK_FIELD(grad_prefix_stride),
  };
  static_assert(leaves_no_gap<Params>(kFields));
};

// What the problem of prefix_kv comes as; its grid depends on no device.
struct PrefixProblem {
  FloatType type, prefix_type;
  PrefixSizes sizes;
  bool aligned;
};

// False with a Python error.
bool parse(PyObject* args, PyObject* keywords, PrefixProblem& p) {
  const char* const names[] = {"dtype", "prefix_dtype", "tokens", "layers",           "heads", "head_dim",
                               "batch", "rows_aligned", "sms",    "shared_per_block", nullptr};
  const char *dtype, *prefix_dtype;
  long long tokens, layers, heads, head_dim, batch;
  int rows_aligned, sms, shared_per_block;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "ssLLLLLpii", const_cast<char**>(names), &dtype, &prefix_dtype,
                                   &tokens, &layers, &heads, &head_dim, &batch, &rows_aligned, &sms,
                                   &shared_per_block) ||
      !parse_type("dtype", dtype, p.type) || !parse_type("prefix_dtype", prefix_dtype, p.prefix_type)) {
    return false;
  }
  if (p.prefix_type != p.type && p.prefix_type != FloatType::kFloat32) {
    PyErr_Format(PyExc_ValueError, "prefix_dtype must be %s or fp32, got %s", dtype, prefix_dtype);
    return false;
  }
  p.sizes = {tokens, 2 * layers, heads, head_dim, batch};
  p.aligned = rows_aligned != 0 && head_dim * (p.type == FloatType::kFloat32 ? 4 : 2) % kChunkBytes == 0;
  return true;
}

PyObject* plan_prefix_kv(PyObject*, PyObject* args, PyObject* keywords) {
  PrefixProblem p;
  if (!parse(args, keywords, p)) return nullptr;
  const PrefixConfig config = prefix_config(p.sizes, p.type, p.prefix_type, p.aligned);
  if (config.blocks > INT32_MAX) return too_many_tiles();
  return to_python({.schedule = "transpose",
                    .reason = "a thread reads a group of elements and writes it for every sample",
                    .kernel = describe_prefix_kv(p.type, config.aligned),
                    .blocks = config.blocks,
                    .workspace_bytes = 0,
                    .params_size = sizeof(PrefixKvParams),
                    .fields = PrefixKvFields::kFields});
}

// A list of launches.
PyObject* plan_prefix_kv_backward(PyObject*, PyObject* args, PyObject* keywords) {
  PrefixProblem p;
  if (!parse(args, keywords, p)) return nullptr;
  PyObject* launches = PyList_New(0);
  for (int64_t parts = p.sizes.parts; parts > 0 && launches != nullptr; parts -= kPrefixGrads) {
    PrefixSizes sizes = p.sizes;
    sizes.parts = std::min<int64_t>(parts, kPrefixGrads);
    const PrefixConfig config = prefix_config(sizes, p.type, p.prefix_type, p.aligned);
    if (config.blocks > INT32_MAX) {
      Py_DECREF(launches);
      return too_many_tiles();
    }
    if (!append(launches, to_python({.schedule = "row_sum",
                                     .reason = "a thread sums over the batch, in its order; a launch has room for the "
                                               "addresses of 32 gradients",
                                     .kernel = describe_prefix_kv_backward(p.type, config.aligned),
                                     .blocks = config.blocks,
                                     .workspace_bytes = 0,
                                     .params_size = sizeof(PrefixKvBackwardParams),
                                     .fields = PrefixKvBackwardFields::kFields}))) {
      Py_CLEAR(launches);
    }
  }
  return launches;
}

const PlannedOp registered({planner("plan_prefix_kv", plan_prefix_kv, "The launch of prefix_kv."),
                            planner("plan_prefix_kv_backward", plan_prefix_kv_backward,
                                    "The launches of its gradient.")},
                           prefix_kv_kernels);

}  // namespace
}  // namespace lk
