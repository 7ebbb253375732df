// prompt_embedding's parameters, and its gradients'.
#pragma once

#include <cstdint>

#include "common.h"

namespace lk {

// A contiguous int32 or int64 array; null where the argument was not given.
struct IndexArray {
  const void* data;
  bool is_int64;
};

// What the rows of one sample of prompt_embedding's output hold: from row `first` on, `split` tokens, `length` prompt
// rows, then the other tokens. The rows before and behind these are zero.
struct PromptLayout {
  int64_t first, split, length;
};

// vocabulary is 0 where embeddings were given instead of ids.
struct PromptSizes {
  int64_t batch, tokens, prompt_rows, hidden, tasks, vocabulary;
};

// Attention mask or labels as bit patterns: [batch, tokens] in, [batch, prompt_rows + tokens] out, both contiguous.
struct TokenColumn {
  const void* tokens;  // null: every token has `prompt_value`
  void* out;           // null: not wanted
  int64_t element_size;
  uint64_t prompt_value, unused_value;
};

// out[b] = the prompt of b's task inserted into b's token embeddings, with the columns beside it.
struct PromptEmbeddingParams {
  PromptSizes sizes;
  FloatType type, prompt_type;
  const void* source;  // of out's type: with ids the table [vocabulary, hidden], else rows [batch, tokens, hidden]
  int64_t source_batch_stride, source_stride;
  IndexArray ids;      // [batch, tokens]
  const void* prompt;  // [tasks, prompt_rows, hidden]
  int64_t prompt_task_stride, prompt_stride;
  IndexArray task_ids;        // [batch]; null: task 0
  IndexArray prompt_lengths;  // [batch]; null: prompt_rows
  TokenColumn mask, labels;
  uint64_t mask_significant;  // bits of a mask element that make it non-zero: all but the sign of a float
  int64_t* positions;         // [batch, prompt_rows + tokens]
  PromptLayout* layout;       // [batch]
  void* out;                  // [batch, prompt_rows + tokens, hidden], contiguous
  bool left;                  // pads are on the left: the prompt goes in front of the first real token
  // CUDA only. An id or task out of range stops the kernel with an error, or else gives a row of NaN.
  bool trap_outside;
  int32_t rows_per_block;
};

// The gradients of the same; an output that is not wanted is null. Sums run over the batch in order.
struct PromptEmbeddingBackwardParams {
  PromptSizes sizes;
  FloatType type, prompt_type;
  const void* grad;  // [batch, prompt_rows + tokens, hidden]
  int64_t grad_batch_stride, grad_stride;
  const PromptLayout* layout;
  IndexArray ids, task_ids;
  void* grad_prompt;  // [tasks, prompt_rows, hidden]; this one and the next two are contiguous
  void* grad_weight;  // [vocabulary, hidden] of grad's type; on the CPU zero on entry
  void* grad_embeds;  // [batch, tokens, hidden] of grad's type
  // CUDA only; trap_outside as above, then the blocks for each gradient, one behind the other, the table's last.
  bool trap_outside;
  int32_t prompt_blocks, embeds_blocks;
};

}  // namespace lk
