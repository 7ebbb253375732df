// prompt_embedding and its gradients: functions over ranges, so that the caller brings the threads.
#pragma once

#include <vector>

#include "../params/prompt_embedding.h"

namespace lk::cpu {

// Fills p.layout. False, with p.layout unspecified, where an id, a task or a prompt length is out of range.
bool prompt_layout(const PromptEmbeddingParams& p);

// Rows [begin, end) of out, taken as [batch * (prompt_rows + tokens), hidden]. Attention mask, position ids and labels
// of a sample come with its first row.
void prompt_rows(const PromptEmbeddingParams& p, int64_t begin, int64_t end);

// False where p.layout, an id or a task does not fit the sizes.
bool prompt_backward_fits(const PromptEmbeddingBackwardParams& p);

// Rows [begin, end) of grad_prompt, taken as [tasks * prompt_rows, hidden].
void prompt_grad_rows(const PromptEmbeddingBackwardParams& p, int64_t begin, int64_t end);

// Rows [begin, end) of grad_embeds, taken as [batch * tokens, hidden].
void token_grad_rows(const PromptEmbeddingBackwardParams& p, int64_t begin, int64_t end);

struct TokenOccurrence {
  int64_t id, token;  // token counts over [batch, tokens]
};

// All tokens by id; those of one id in order.
std::vector<TokenOccurrence> sorted_tokens(const PromptEmbeddingBackwardParams& p);

// Rows of grad_weight for the ids whose first occurrence is in [begin, end): a row belongs to one thread.
void weight_grad_rows(const PromptEmbeddingBackwardParams& p, const std::vector<TokenOccurrence>& tokens, int64_t begin,
                      int64_t end);

}  // namespace lk::cpu
