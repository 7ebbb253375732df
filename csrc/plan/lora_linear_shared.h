// What plans of lora_linear and of its relatives (in groups, of many adapters, in packs) share.
#pragma once

#include <optional>
#include <vector>

#include "../launch/lora_linear.h"
#include "../params/lora_linear.h"
#include "plan.h"

namespace lk {

struct LoraLinearFields {
  using Params = LoraLinearParams;
  static constexpr std::array kFields = {
      LK_FIELD(x),
      LK_FIELD(w),
      LK_FIELD(a),
      LK_FIELD(b),
      LK_FIELD(bias),
      LK_FIELD(y),
      LK_FIELD(s),
      LK_FIELD(x_stride),
      LK_FIELD(w_stride),
      LK_FIELD(a_stride),
      LK_FIELD(b_stride),
      LK_FIELD(y_stride),
      LK_FIELD(m),
      LK_FIELD(n),
      LK_FIELD(k),
      LK_FIELD(rank),
      LK_FIELD(adapters_are_float),
      LK_FIELD(scaling),
      LK_FIELD(dropout_threshold),
      LK_FIELD(dropout_scale),
      LK_FIELD(seed),
      LK_FIELD(seed_step),
      LK_FIELD(counters),
      LK_FIELD(group_rows),
      LK_FIELD(splits),
      LK_FIELD(split_depth),
      LK_FIELD(partials),
      LK_FIELD(saved_s),
      LK_FIELD(partial_grad_b),
  };
  static_assert(lists_all<Params>(kFields));
};

struct LoraGradsFields {
  using Params = LoraGradsParams;
  static constexpr std::array kFields = {
      LK_FIELD(x),
      LK_FIELD(grad_y),
      LK_FIELD(s),
      LK_FIELD(grad_s),
      LK_FIELD(grad_a),
      LK_FIELD(grad_b),
      LK_FIELD(x_stride),
      LK_FIELD(grad_y_stride),
      LK_FIELD(m),
      LK_FIELD(n),
      LK_FIELD(k),
      LK_FIELD(rank),
      LK_FIELD(grads_are_float),
      LK_FIELD(scaling),
      LK_FIELD(dropout_threshold),
      LK_FIELD(dropout_scale),
      LK_FIELD(seed),
      LK_FIELD(seed_step),
      LK_FIELD(splits),
      LK_FIELD(split_rows),
      LK_FIELD(partials),
      LK_FIELD(counters),
      LK_FIELD(partial_grad_b),
      LK_FIELD(parts_of_grad_b),
  };
  static_assert(lists_all<Params>(kFields));
};

// The vendor's GEMM, of which nothing more is known.
inline PyObject* product(const char* text, const char* why) {
  return Py_BuildValue("{s:s,s:s,s:s}", "schedule", "cublas", "reason", why, "product", text);
}

// Who shall choose, by name. False with a Python error.
inline bool parse_wanted(const char* schedule, Wanted& wanted) {
  const std::optional<Wanted> named = wanted_by(schedule);
  if (!named) {
    PyErr_Format(PyExc_ValueError, "schedule must be %s, got \"%s\"", kWantedNames, schedule);
    return false;
  }
  wanted = *named;
  return true;
}

// The launch that sums gradients of adapters.
inline Plan grads_plan(const LoraGradsConfig& config, std::string reason, const KernelInfo& kernel, size_t params_size,
                       std::span<const Field> fields) {
  return {.schedule = "split rows",
          .reason = std::move(reason),
          .kernel = kernel,
          .blocks = config.blocks,
          .workspace_bytes = (config.counters + config.partials) * kBytesWord,
          .params_size = params_size,
          .fields = fields};
}

// `all`, a list, with these at its end; null with a Python error.
template <class Plans>
PyObject* extended(PyObject* all, const Plans& plans) {
  if (all == nullptr) return nullptr;
  for (const Plan& plan : plans) {
    if (append(all, to_python(plan))) continue;
    Py_DECREF(all);
    return nullptr;
  }
  return all;
}

// kernels_of.operator()<Element>(), a list, of every type of elements.
template <class KernelsOf>
std::vector<KernelInfo> of_every_type(const KernelsOf& kernels_of) {
  std::vector<KernelInfo> all;
  for (const FloatType type : {FloatType::kBFloat16, FloatType::kFloat16, FloatType::kFloat32}) {
    with_element(type, [&]<class Element>(std::type_identity<Element>) {
      const std::vector<KernelInfo> some = kernels_of.template operator()<Element>();
      all.insert(all.end(), some.begin(), some.end());
    });
  }
  return all;
}

}  // namespace lk
