// Rows of prompts and tokens: indices that never lead out of an array, and where a prompt lies.
#pragma once

#include "../params/prompt_embedding.h"
#include "rows.cuh"

namespace lk {

constexpr int kOutside = -1;

LK_DEVICE int64_t value_at(const IndexArray& a, int64_t i) {
  return a.is_int64 ? load_global(static_cast<const int64_t*>(a.data) + i)
                    : int64_t{load_global(static_cast<const int32_t*>(a.data) + i)};
}

// Element i of an index array, or kOutside where that is not within [0, limit). An array that was not given holds
// `otherwise`.
LK_DEVICE int index_at(const IndexArray& a, int64_t i, int64_t limit, int otherwise, bool trap_outside) {
  if (a.data == nullptr) return otherwise;
  const int64_t index = value_at(a, i);
  if (index >= 0 && index < limit) return static_cast<int>(index);
  if (trap_outside) trap();
  return kOutside;
}

// Element i of an array of lengths in [0, most]; one out of range is taken for the nearest. Not given: `most`.
LK_DEVICE int length_at(const IndexArray& a, int64_t i, int most, bool trap_outside) {
  if (a.data == nullptr) return most;
  const int64_t length = value_at(a, i);
  if (length >= 0 && length <= most) return static_cast<int>(length);
  if (trap_outside) trap();
  return length < 0 ? 0 : most;
}

// A PromptLayout in registers.
struct Place {
  int first, split, length;
};

// What a row of the output holds.
struct Row {
  enum { kUnused, kPrompt, kToken } kind;
  int index;
};

LK_DEVICE Row row_of(const Place& place, int tokens, int row) {
  const int r = row - place.first;
  if (r < 0 || r >= tokens + place.length) return {Row::kUnused, 0};
  if (r < place.split) return {Row::kToken, r};
  if (r < place.split + place.length) return {Row::kPrompt, r - place.split};
  return {Row::kToken, r - place.length};
}

// The row that holds a token.
LK_DEVICE int row_of_token(const Place& place, int token) {
  return place.first + token + (token < place.split ? 0 : place.length);
}

}  // namespace lk
