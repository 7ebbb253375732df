// Plans of dequantize.
#include "../launch/dequantize.h"

#include "plan.h"

namespace lk {
namespace {

struct DequantizeFields {
  using Params = DequantizeParams;
  static constexpr std::array kFields = {
      LK_FIELD(weight.data),  LK_FIELD(weight.scales), LK_FIELD(weight.code),  LK_FIELD(weight.scales2),
      LK_FIELD(weight.code2), LK_FIELD(weight.offset), LK_FIELD(weight.count), LK_FIELD(weight.block),
      LK_FIELD(type),         LK_FIELD(out),
  };
  static_assert(leaves_no_gap<Params>(kFields));
};

PyObject* plan_dequantize(PyObject*, PyObject* args, PyObject* keywords) {
  const char* const names[] = {"dtype", "n", "k", "block", "aligned", "sms", "shared_per_block", nullptr};
  const char* dtype;
  long long n, k, block;
  int aligned, sms, shared_per_block;
  FloatType type;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "sLLLpii", const_cast<char**>(names), &dtype, &n, &k, &block,
                                   &aligned, &sms, &shared_per_block) ||
      !parse_type("dtype", dtype, type)) {
    return nullptr;
  }
  if (block % 2 != 0 || k % block != 0) {
    return PyErr_Format(PyExc_ValueError, "block must be even, and k a multiple of it, got %lld and %lld", block, k);
  }
  const DequantizeConfig config = dequantize_config(n * k, block, aligned != 0);
  if (config.blocks > INT32_MAX) return too_many_tiles();
  return to_python({.schedule = "codes4",
                    .reason = config.aligned ? "a lane copies packed bytes 16 at a time, and stores 16 bytes of weights"
                                             : "a thread has one byte: the packed weights do not begin at 16 bytes, or "
                                               "their block is no power of two from 32",
                    .kernel = describe_dequantize(type, config.aligned),
                    .blocks = config.blocks,
                    .workspace_bytes = 0,
                    .params_size = sizeof(DequantizeParams),
                    .fields = DequantizeFields::kFields});
}

const PlannedOp registered({planner("plan_dequantize", plan_dequantize, "The launch of dequantize.")},
                           dequantize_kernels);

}  // namespace
}  // namespace lk
