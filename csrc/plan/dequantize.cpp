// Plans of dequantize.
#include "../launch/dequantize.h"

#include <algorithm>
#include <iterator>
#include <string>

#include "packed_weight.h"

namespace lk {
namespace {

struct DequantizeFields {
  using Params = DequantizeParams;
  static constexpr std::array kFields = {
      LK_PACKED_WEIGHT_FIELDS, LK_FIELD(runs.first), LK_FIELD(runs.count), LK_FIELD(runs.length),
      LK_FIELD(runs.stride),   LK_FIELD(type),       LK_FIELD(out),
  };
  static_assert(leaves_no_gap<Params>(kFields));
};

PyObject* plan_dequantize(PyObject*, PyObject* args, PyObject* keywords) {
  const char* const names[] = {"dtype", "layout", "n", "k", "block", "aligned", "sms", "shared_per_block", nullptr};
  const char *dtype, *layout;
  long long n, k, block;
  int aligned, sms, shared_per_block;
  FloatType type;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "ssLLLpii", const_cast<char**>(names), &dtype, &layout, &n, &k,
                                   &block, &aligned, &sms, &shared_per_block) ||
      !parse_type("dtype", dtype, type) || !is_positive("block", block)) {
    return nullptr;
  }
  const auto named =
      std::ranges::find_if(kPackedLayouts, [&](const auto& known) { return std::string(layout) == known.name; });
  if (named == std::end(kPackedLayouts)) return PyErr_Format(PyExc_ValueError, "layout %s is not known", layout);
  if (is_codes4(named->layout) && (block % 2 != 0 || k % block != 0)) {
    return PyErr_Format(PyExc_ValueError, "block must be even, and k a multiple of it, got %lld and %lld", block, k);
  }
  PackedParts weight{};
  weight.n = static_cast<int32_t>(n);
  weight.k = static_cast<int32_t>(k);
  weight.block = static_cast<int32_t>(block);
  weight.block_rows = 1;
  weight.layout = named->layout;
  const DequantizeConfig config = dequantize_config(weight, rows_of(weight, 0, n), aligned != 0);
  if (config.blocks > INT32_MAX) return too_many_tiles();
  return to_python({.schedule = named->name,
                    .reason = config.aligned ? "a lane copies packed bytes 16 at a time, and stores 16 bytes of weights"
                                             : "a thread has one byte: the packed weights do not begin at 16 bytes, or "
                                               "neighbours that 16 bytes are written of have several scales",
                    .kernel = describe_dequantize(named->layout, type, config.aligned),
                    .blocks = config.blocks,
                    .workspace_bytes = 0,
                    .params_size = sizeof(DequantizeParams),
                    .fields = DequantizeFields::kFields});
}

const PlannedOp registered({planner("plan_dequantize", plan_dequantize, "The launch of dequantize.")},
                           dequantize_kernels);

}  // namespace
}  // namespace lk
