// The fields of each kernel's Params by name, for tools that run a kernel without compiling this code (a simulator, a
// profiler). Host only.
#pragma once

#include <array>
#include <cstddef>
#include <span>
#include <utility>

#include "params.h"

namespace lk {

struct Field {
  const char* name;
  size_t offset, size;
};

struct Anything {
  template <class T>
  constexpr operator T() const;
};

// Whether a struct can be initialised with this many values: no more than it has fields.
template <class Params, size_t... I>
consteval bool holds(std::index_sequence<I...>) {
  return requires { Params{((void)I, Anything{})...}; };
}

// Whether every field of Params is listed, once and in order.
template <class Params, size_t kCount>
consteval bool lists_all(const std::array<Field, kCount>& fields) {
  for (size_t i = 1; i < kCount; ++i) {
    if (fields[i].offset < fields[i - 1].offset + fields[i - 1].size) return false;
  }
  return holds<Params>(std::make_index_sequence<kCount>{}) && !holds<Params>(std::make_index_sequence<kCount + 1>{});
}

#define LK_FIELD(name) \
  Field { #name, offsetof(Params, name), sizeof(Params::name) }

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
      LK_FIELD(splits),
      LK_FIELD(split_rows),
      LK_FIELD(partials),
      LK_FIELD(counters),
      LK_FIELD(partial_grad_b),
      LK_FIELD(parts_of_grad_b),
  };
  static_assert(lists_all<Params>(kFields));
};

// Params that hold other structs list the members of these. Their count is not known to the language; but a member
// that is missing, other than at the end or in front of padding, leaves a gap.
template <class Params, size_t kCount>
consteval bool leaves_no_gap(const std::array<Field, kCount>& fields) {
  size_t end = 0;
  for (const Field& f : fields) {
    if (f.offset != (end + f.size - 1) / f.size * f.size) return false;
    end = f.offset + f.size;
  }
  return (end + alignof(Params) - 1) / alignof(Params) * alignof(Params) == sizeof(Params);
}

#define LK_SIZES_FIELDS                                                                               \
  LK_FIELD(sizes.batch), LK_FIELD(sizes.tokens), LK_FIELD(sizes.prompt_rows), LK_FIELD(sizes.hidden), \
      LK_FIELD(sizes.tasks), LK_FIELD(sizes.vocabulary)
#define LK_INDEX_FIELDS(name) LK_FIELD(name.data), LK_FIELD(name.is_int64)
#define LK_COLUMN_FIELDS(name)                                                                         \
  LK_FIELD(name.tokens), LK_FIELD(name.out), LK_FIELD(name.element_size), LK_FIELD(name.prompt_value), \
      LK_FIELD(name.unused_value)

struct PromptEmbeddingFields {
  using Params = PromptEmbeddingParams;
  static constexpr std::array kFields = {
      LK_SIZES_FIELDS,
      LK_FIELD(type),
      LK_FIELD(prompt_type),
      LK_FIELD(source),
      LK_FIELD(source_batch_stride),
      LK_FIELD(source_stride),
      LK_INDEX_FIELDS(ids),
      LK_FIELD(prompt),
      LK_FIELD(prompt_task_stride),
      LK_FIELD(prompt_stride),
      LK_INDEX_FIELDS(task_ids),
      LK_INDEX_FIELDS(prompt_lengths),
      LK_COLUMN_FIELDS(mask),
      LK_COLUMN_FIELDS(labels),
      LK_FIELD(mask_significant),
      LK_FIELD(positions),
      LK_FIELD(layout),
      LK_FIELD(out),
      LK_FIELD(left),
      LK_FIELD(trap_outside),
      LK_FIELD(rows_per_block),
  };
  static_assert(leaves_no_gap<Params>(kFields));
};

struct PromptEmbeddingBackwardFields {
  using Params = PromptEmbeddingBackwardParams;
  static constexpr std::array kFields = {
      LK_SIZES_FIELDS,
      LK_FIELD(type),
      LK_FIELD(prompt_type),
      LK_FIELD(grad),
      LK_FIELD(grad_batch_stride),
      LK_FIELD(grad_stride),
      LK_FIELD(layout),
      LK_INDEX_FIELDS(ids),
      LK_INDEX_FIELDS(task_ids),
      LK_FIELD(grad_prompt),
      LK_FIELD(grad_weight),
      LK_FIELD(grad_embeds),
      LK_FIELD(trap_outside),
      LK_FIELD(prompt_blocks),
      LK_FIELD(embeds_blocks),
  };
  static_assert(leaves_no_gap<Params>(kFields));
};

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

#undef LK_PREFIX_FIELDS
#undef LK_SIZES_FIELDS
#undef LK_INDEX_FIELDS
#undef LK_COLUMN_FIELDS
#undef LK_FIELD

}  // namespace lk
