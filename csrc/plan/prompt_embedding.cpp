// Plans of prompt_embedding and its gradients.
#include "../launch/prompt_embedding.h"

#include "plan.h"

namespace lk {
namespace {

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

// What the problem of prompt_embedding and the device come as; its grid depends on no device.
struct PromptProblem {
  FloatType type;
  PromptSizes sizes;
  int rows_aligned, looks_for_tokens, need_prompt, need_weight, need_embeds;

  bool aligned() const {
    return rows_aligned != 0 && sizes.hidden * (type == FloatType::kFloat32 ? 4 : 2) % kChunkBytes == 0;
  }
};

// False with a Python error.
bool parse(PyObject* args, PyObject* keywords, PromptProblem& p) {
  const char* const names[] = {
      "dtype",        "batch",       "tokens",      "prompt_rows", "hidden",           "tasks", "vocabulary",
      "rows_aligned", "need_prompt", "need_weight", "need_embeds", "looks_for_tokens", "sms",   "shared_per_block",
      nullptr};
  const char* dtype;
  long long batch, tokens, prompt_rows, hidden, tasks, vocabulary;
  int sms, shared_per_block;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "sLLLLLLpppppii", const_cast<char**>(names), &dtype, &batch, &tokens,
                                   &prompt_rows, &hidden, &tasks, &vocabulary, &p.rows_aligned, &p.need_prompt,
                                   &p.need_weight, &p.need_embeds, &p.looks_for_tokens, &sms, &shared_per_block)) {
    return false;
  }
  p.sizes = {batch, tokens, prompt_rows, hidden, tasks, vocabulary};
  return parse_type("dtype", dtype, p.type);
}

PyObject* plan_prompt_embedding(PyObject*, PyObject* args, PyObject* keywords) {
  PromptProblem p;
  if (!parse(args, keywords, p)) return nullptr;
  const PromptEmbeddingConfig config = prompt_embedding_config(p.sizes, p.aligned(), p.looks_for_tokens != 0);
  if (config.blocks > INT32_MAX) return too_many_tiles();
  return to_python({.schedule = "gather",
                    .reason = config.reason,
                    .kernel = describe_prompt_embedding(p.type, config.aligned),
                    .blocks = config.blocks,
                    .workspace_bytes = 0,
                    .params_size = sizeof(PromptEmbeddingParams),
                    .fields = PromptEmbeddingFields::kFields});
}

PyObject* plan_prompt_embedding_backward(PyObject*, PyObject* args, PyObject* keywords) {
  PromptProblem p;
  if (!parse(args, keywords, p)) return nullptr;
  const PromptBackwardConfig config =
      prompt_backward_config(p.sizes, p.aligned(), p.need_prompt != 0, p.need_weight != 0, p.need_embeds != 0);
  if (config.blocks() > INT32_MAX) return too_many_tiles();
  return to_python({.schedule = "row_sum",
                    .reason = "a thread sums over the batch, in its order",
                    .kernel = describe_prompt_embedding_backward(p.type, config.aligned),
                    .blocks = config.blocks(),
                    .workspace_bytes = 0,
                    .params_size = sizeof(PromptEmbeddingBackwardParams),
                    .fields = PromptEmbeddingBackwardFields::kFields});
}

const PlannedOp registered({planner("plan_prompt_embedding", plan_prompt_embedding, "The launch of prompt_embedding."),
                            planner("plan_prompt_embedding_backward", plan_prompt_embedding_backward,
                                    "The launch of its gradients.")},
                           prompt_embedding_kernels);

}  // namespace
}  // namespace lk
