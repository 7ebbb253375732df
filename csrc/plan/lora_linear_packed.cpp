// Plans of lora_linear_packed, for few rows.
#include "../launch/lora_linear_packed.h"

#include "packed_weight.h"

namespace lk {
namespace {

struct LoraLinearPackedFields {
  using Params = LoraLinearPackedParams;
  static constexpr std::array kFields = {
      LK_PACKED_WEIGHT_FIELDS,
      LK_FIELD(x),
      LK_FIELD(x_stride),
      LK_FIELD(a),
      LK_FIELD(a_stride),
      LK_FIELD(b),
      LK_FIELD(b_stride),
      LK_FIELD(bias),
      LK_FIELD(y),
      LK_FIELD(s),
      LK_FIELD(counters),
      LK_FIELD(partials),
      LK_FIELD(m),
      LK_FIELD(n),
      LK_FIELD(k),
      LK_FIELD(rank),
      LK_FIELD(parts),
      LK_FIELD(scaling),
      LK_FIELD(adapter_type),
  };
  static_assert(leaves_no_gap<Params>(kFields));
};

PyObject* plan_lora_linear_packed(PyObject*, PyObject* args, PyObject* keywords) {
  const char* const names[] = {"dtype",      "m",    "n", "k", "block", "rank", "sms", "shared_per_block",
                               "capability", nullptr};
  const char* dtype;
  long long m, n, k, block, rank;
  int sms, shared_per_block, capability;
  FloatType type;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "sLLLLLiii", const_cast<char**>(names), &dtype, &m, &n, &k, &block,
                                   &rank, &sms, &shared_per_block, &capability) ||
      !parse_type("dtype", dtype, type) || !is_positive("block", block)) {
    return nullptr;
  }
  if (k % block != 0 || !serves_packed(m, k, block, rank, true, false) || m > most_decoded_rows(capability) ||
      type == FloatType::kFloat32) {
    PyErr_SetString(PyExc_ValueError,
                    "one launch serves 1 to 64 rows (sm_100: 32) of bf16 or fp16, blocks of 64 weights or a larger "
                    "power of two that k is a multiple of, and ranks up to 64; others take those of dequantize and of "
                    "lora_linear");
    return nullptr;
  }
  const LoraLinearPackedConfig config = lora_linear_packed_config(m, n, k, rank);
  if (config.blocks > INT32_MAX) return too_many_tiles();
  return to_python({.schedule = "decode",
                    .reason = "few rows: reading the packed weight is all that counts, and no other launch does",
                    .kernel = describe_lora_linear_packed(type, config),
                    .blocks = config.blocks,
                    .workspace_bytes = kBytesWord * (config.counters + config.partials),
                    .params_size = sizeof(LoraLinearPackedParams),
                    .fields = LoraLinearPackedFields::kFields});
}

const PlannedOp registered({planner("plan_lora_linear_packed", plan_lora_linear_packed,
                                    "The launch of lora_linear_packed for few rows.")},
                           lora_linear_packed_kernels);

}  // namespace
}  // namespace lk
