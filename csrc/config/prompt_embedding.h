// The grids of prompt_embedding and its gradients, which launches, kernels, plans and tests agree on. No CUDA.
#pragma once

#include <cstdint>

#include "../params/prompt_embedding.h"
#include "tiles.h"

namespace lk {

constexpr int kPromptThreads = 256, kPromptWarps = kPromptThreads / 32;
constexpr int kVocabularyRows = 64;  // of the table's gradient in one block

// Elements that a thread converts or sums at a time: 8 or 16 bytes where rows are aligned.
constexpr int prompt_group(bool aligned) { return aligned ? 4 : 1; }

struct PromptEmbeddingConfig {
  bool aligned;  // all rows begin at 16 bytes and are a multiple of 16 bytes long
  int rows_per_block;
  int64_t blocks;
  const char* reason;
};

struct PromptBackwardConfig {
  bool aligned;
  int64_t prompt_blocks, embeds_blocks, weight_blocks;  // one behind the other; none for what is not wanted
  constexpr int64_t blocks() const { return prompt_blocks + embeds_blocks + weight_blocks; }
};

// looks_for_tokens: where a sample's prompt goes depends on its mask.
constexpr PromptEmbeddingConfig prompt_embedding_config(const PromptSizes& s, bool aligned, bool looks_for_tokens) {
  PromptEmbeddingConfig config{};
  config.aligned = aligned;
  config.rows_per_block = looks_for_tokens ? 4 * kPromptWarps : kPromptWarps;
  config.blocks = s.batch * (1 + blocks_of(s.prompt_rows + s.tokens, config.rows_per_block));
  config.reason = looks_for_tokens
                      ? "a block looks for the first real token itself, and then copies several rows per warp"
                      : "a row per warp";
  return config;
}

constexpr PromptBackwardConfig prompt_backward_config(const PromptSizes& s, bool aligned, bool need_prompt,
                                                      bool need_weight, bool need_embeds) {
  PromptBackwardConfig config{};
  config.aligned = aligned;
  const int64_t groups = blocks_of(s.hidden, prompt_group(aligned));
  if (need_prompt) config.prompt_blocks = blocks_of(s.tasks * s.prompt_rows * groups, kPromptThreads);
  if (need_embeds) config.embeds_blocks = blocks_of(s.batch * s.tokens, kPromptWarps);
  if (need_weight) config.weight_blocks = blocks_of(s.vocabulary, kVocabularyRows);
  return config;
}

}  // namespace lk
