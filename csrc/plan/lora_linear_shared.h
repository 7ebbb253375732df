// What plans of lora_linear and of the same in groups share.
#pragma once

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

}  // namespace lk
