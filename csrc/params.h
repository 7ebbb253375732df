// Plain parameter structs, one per kernel. No torch, no CUDA: strides are in elements, rows are contiguous.
#pragma once

#include <cstdint>

#include "philox.h"

namespace lk {

// keep[m, k] = whether element (m, k) of a [rows, columns] matrix survives dropout.
// The seed stays where it is: on a GPU, reading it on the host would wait for the device.
struct DropoutMaskParams {
  bool* keep;
  int64_t rows, columns;
  const int64_t* seed;
  uint32_t threshold;
};

// y = x wᵀ + bias + scaling · s bᵀ with s = dropout(x) aᵀ, on tensor cores. Elements are bf16, fp16, or fp32 whose
// products are formed in tf32, as the kernel says; rows are `stride` elements apart.
//
// Also the gradient of x, dX = dY W + scaling · mask ∘ (s' A) with s' = dY B: then x is dY, w, a and b are W [k, n],
// B [k, rank] and A [rank, n] in memory, y is dX, and dropout acts on the branch.
struct LoraLinearParams {
  const void* x;     // [m, k]
  const void* w;     // [n, k]
  const void* a;     // [rank, k]
  const void* b;     // [n, rank]
  const void* bias;  // [n]; null: none
  void* y;           // [m, n]
  void* s;           // [m, rank], contiguous
  int64_t x_stride, w_stride, a_stride, b_stride, y_stride;
  int32_t m, n, k, rank;
  bool adapters_are_float;  // a and b are fp32, and rounded to 16-bit elements on the way
  float scaling;
  uint32_t dropout_threshold;
  float dropout_scale;
  const int64_t* seed;  // null: no dropout
  // Zero before the launch and again after it. Ticketed and column-0: tickets drawn, blocks done, then one flag per
  // block of rows. Dual and decode, where splits > 1: one per tile.
  uint32_t* counters;
  int32_t group_rows;  // blocks of rows whose tiles are drawn together
  // Dual and decode: the depth is cut into `splits` parts of split_depth.
  int32_t splits, split_depth;
  float* partials;
  // Gradient of x: s of the forward [m, rank], and where parts of dB = dYᵀ s go, one [k, 16] per block of rows. Null:
  // not wanted.
  const void* saved_s;
  float* partial_grad_b;
};

// dA = scaling · s'ᵀ dropout(x) and dB = scaling · dYᵀ s, on tensor cores. Null gradients are not wanted.
struct LoraGradsParams {
  const void* x;       // [m, k]
  const void* grad_y;  // [m, n]
  const void* s;       // [m, rank], contiguous; and s' = dY B
  const void* grad_s;
  void* grad_a;  // [rank, k], contiguous, elements like x or, if grads_are_float, float
  void* grad_b;  // [n, rank]
  int64_t x_stride, grad_y_stride;
  int32_t m, n, k, rank;
  bool grads_are_float;
  float scaling;
  uint32_t dropout_threshold;
  float dropout_scale;
  const int64_t* seed;          // null: no dropout
  int32_t splits, split_rows;   // the rows are cut into `splits` parts of split_rows
  float* partials;              // null if splits is 1
  uint32_t* counters;           // one per tile, zero before the launch and again after it
  const float* partial_grad_b;  // [parts_of_grad_b, n, 16]: dB is scaling · their sum; null: dB is computed here
  int32_t parts_of_grad_b;
};

// The narrow products of a LoRA branch on the CPU, in fp32. Without dropout `mask` is all ones and its scale 1.

// s[m, :] = (mask ∘ x)[m, :] · Wᵀ, times the mask's scale; `packed` is W [rank, k] as pack_transposed lays it out.
struct LoraShrinkParams {
  const float* x;  // [rows, k]
  int64_t x_stride;
  const float* packed;
  float* s;  // [rows, rank], contiguous
  int64_t rows, k, rank;
  bool has_dropout;
  int64_t first_row;  // of x within the matrix that the mask belongs to
  Dropout dropout;
};

// grad[j, c] += alpha · sum over m of s[m, j] · (mask ∘ x)[m, c], and, while the mask is at hand,
// grad_x += alpha · mask ∘ (s · A). Either part may be absent.
struct LoraGradParams {
  const float* x;  // [rows, k]; null where grad is not wanted
  int64_t x_stride;
  const float* s;  // [rows, rank], contiguous
  float* grad;     // element (j, c) at grad[j * grad_stride_j + c * grad_stride_c]
  int64_t grad_stride_j, grad_stride_c;
  const float* a;  // [rank, k]; null where grad_x is not wanted
  int64_t a_stride;
  float* grad_x;  // [rows, k]
  int64_t grad_x_stride;
  float alpha;
  int64_t rows, k, rank;
  bool has_dropout;
  int64_t first_row;
  Dropout dropout;
};

// y = x Wᵀ + bias + alpha · s Bᵀ for a few rows of x. bias and s may be null.
struct LoraDecodeParams {
  const float* x;  // [rows, k]
  int64_t x_stride;
  const float* w;  // [n, k]
  int64_t w_stride;
  const float* bias;
  const float* s;  // [rows, rank], contiguous
  const float* b;  // [n, rank]
  int64_t b_stride;
  float alpha;
  float* y;  // [rows, n], contiguous
  int64_t rows, n, k, rank;
};

// Element types of the kernels that convert between them.
enum class FloatType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

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

// A prefix for attention: `parts` are the keys and the values of every layer, in this order.
struct PrefixSizes {
  int64_t tokens, parts, heads, head_dim, batch;
};

// out[part, b, head, t, :] = prefix[t, part, head, :] for every sample b.
struct PrefixKvParams {
  PrefixSizes sizes;
  FloatType type, prefix_type;
  const void* prefix;  // [tokens, parts * heads * head_dim]
  int64_t prefix_stride;
  void* out;  // [parts, batch, heads, tokens, head_dim], contiguous
};

// The gradient of one part: [batch, heads, tokens, head_dim].
struct PrefixGrad {
  const void* data;
  int64_t batch_stride, head_stride, token_stride;
};

// Parts whose gradients one launch sums: these stand in the parameters, and are not copied to be one tensor.
constexpr int kPrefixGrads = 32;

// grad_prefix[t, part, head, :] = the sum of grads[part][b, head, t, :] over the samples, in their order.
struct PrefixKvBackwardParams {
  PrefixGrad grads[kPrefixGrads];
  PrefixSizes sizes;  // parts: of this launch
  FloatType type, prefix_type;
  void* grad_prefix;  // at the first of these parts: [tokens, parts * heads * head_dim], rows `stride` apart
  int64_t grad_prefix_stride;
};

}  // namespace lk
