#include "prompt_embedding.h"

#include <algorithm>
#include <cstring>
#include <tuple>

#include "rows.h"

namespace lk::cpu {
namespace {

// Rows of the table lie anywhere in memory: the start of one is fetched this many rows ahead, the rest the CPU guesses.
constexpr int64_t kPrefetchRows = 4, kPrefetchBytes = 256;

// ------------------------------------------------------------------------------------------------- types

template <class F>
auto with_bits_type(int64_t element_size, const F& f) {
  switch (element_size) {
    case 1:
      return f(uint8_t{});
    case 2:
      return f(uint16_t{});
    case 4:
      return f(uint32_t{});
    default:
      return f(uint64_t{});
  }
}

const char* bytes(const void* p) { return static_cast<const char*>(p); }
char* bytes(void* p) { return static_cast<char*>(p); }

// ----------------------------------------------------------------------------------------------- indices

// The value of an array that was not given is `otherwise`.
int64_t value_at(const IndexArray& a, int64_t i, int64_t otherwise) {
  if (a.data == nullptr) return otherwise;
  return a.is_int64 ? static_cast<const int64_t*>(a.data)[i] : static_cast<const int32_t*>(a.data)[i];
}

template <class T>
bool all_below(const T* values, int64_t count, uint64_t limit) {
  bool good = true;  // no early exit: this vectorises, and bad calls are rare
  for (int64_t i = 0; i < count; ++i) good &= static_cast<uint64_t>(static_cast<int64_t>(values[i])) < limit;
  return good;
}

bool all_below(const IndexArray& a, int64_t count, int64_t limit) {
  if (a.data == nullptr) return true;
  return a.is_int64 ? all_below(static_cast<const int64_t*>(a.data), count, limit)
                    : all_below(static_cast<const int32_t*>(a.data), count, limit);
}

bool indices_fit(const PromptSizes& s, const IndexArray& ids, const IndexArray& task_ids) {
  return all_below(ids, s.batch * s.tokens, s.vocabulary) && all_below(task_ids, s.batch, s.tasks);
}

// ------------------------------------------------------------------------------------------------ columns

// Index of the first real token of sample b; `tokens` if there is none.
int64_t first_real_token(const PromptEmbeddingParams& p, int64_t b) {
  if (p.mask.tokens == nullptr) return 0;
  return with_bits_type(p.mask.element_size, [&](auto zero) {
    using T = decltype(zero);
    const T significant = static_cast<T>(p.mask_significant);
    const T* begin = static_cast<const T*>(p.mask.tokens) + b * p.sizes.tokens;
    return static_cast<int64_t>(
        std::find_if(begin, begin + p.sizes.tokens, [&](T bits) { return (bits & significant) != 0; }) - begin);
  });
}

template <class T>
void write_column(const PromptEmbeddingParams& p, const TokenColumn& column, int64_t b) {
  const int64_t tokens = p.sizes.tokens, rows = p.sizes.prompt_rows + tokens;
  const PromptLayout& layout = p.layout[b];
  const T prompt = static_cast<T>(column.prompt_value), unused = static_cast<T>(column.unused_value);
  T* const begin = static_cast<T*>(column.out) + b * rows;
  T* out = std::fill_n(begin, layout.first, unused);
  if (column.tokens == nullptr) {
    out = std::fill_n(out, tokens + layout.length, prompt);
  } else {
    const T* in = static_cast<const T*>(column.tokens) + b * tokens;
    out = std::copy_n(in, layout.split, out);
    out = std::fill_n(out, layout.length, prompt);
    out = std::copy_n(in + layout.split, tokens - layout.split, out);
  }
  std::fill(out, begin + rows, unused);
}

template <class T>
void write_positions(const PromptEmbeddingParams& p, int64_t b) {
  const int64_t rows = p.sizes.prompt_rows + p.sizes.tokens;
  const T significant = static_cast<T>(p.mask_significant);
  const T* mask = static_cast<const T*>(p.mask.out) + b * rows;
  int64_t* positions = p.positions + b * rows;
  int64_t real = 0;
  for (int64_t r = 0; r < rows; ++r) {
    real += (mask[r] & significant) != 0;
    positions[r] = std::max<int64_t>(real - 1, 0);
  }
}

void write_columns(const PromptEmbeddingParams& p, int64_t b) {
  with_bits_type(p.mask.element_size, [&](auto zero) {
    write_column<decltype(zero)>(p, p.mask, b);
    write_positions<decltype(zero)>(p, b);
  });
  if (p.labels.out == nullptr) return;
  with_bits_type(p.labels.element_size, [&](auto zero) { write_column<decltype(zero)>(p, p.labels, b); });
}

// --------------------------------------------------------------------------------------------------- sums

// Row of the output that holds token t.
int64_t output_row(const PromptLayout& layout, int64_t t) {
  return layout.first + t + (t < layout.split ? 0 : layout.length);
}

template <class T>
const T* grad_row(const PromptEmbeddingBackwardParams& p, int64_t b, int64_t row) {
  return static_cast<const T*>(p.grad) + b * p.grad_batch_stride + row * p.grad_stride;
}

}  // namespace

// ------------------------------------------------------------------------------------------------ forward

bool prompt_layout(const PromptEmbeddingParams& p) {
  const PromptSizes& s = p.sizes;
  if (!indices_fit(s, p.ids, p.task_ids) || !all_below(p.prompt_lengths, s.batch, s.prompt_rows + 1)) return false;
  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t length = value_at(p.prompt_lengths, b, s.prompt_rows);
    p.layout[b] =
        p.left ? PromptLayout{s.prompt_rows - length, first_real_token(p, b), length} : PromptLayout{0, 0, length};
  }
  return true;
}

void prompt_rows(const PromptEmbeddingParams& p, int64_t begin, int64_t end) {
  const PromptSizes& s = p.sizes;
  const int64_t rows = s.prompt_rows + s.tokens, element = size_of(p.type), row_bytes = s.hidden * element;
  const auto token_row = [&](int64_t b, int64_t t) {
    const int64_t row = value_at(p.ids, b * s.tokens + t, t);
    return bytes(p.source) + (b * p.source_batch_stride + row * p.source_stride) * element;
  };
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / rows;
    if (i % rows == 0) write_columns(p, b);
    const PromptLayout& layout = p.layout[b];
    const int64_t r = i % rows - layout.first;
    char* out = bytes(p.out) + i * row_bytes;
    if (r < 0 || r >= s.tokens + layout.length) {
      memset(out, 0, row_bytes);
    } else if (r >= layout.split && r < layout.split + layout.length) {
      const int64_t offset = value_at(p.task_ids, b, 0) * p.prompt_task_stride + (r - layout.split) * p.prompt_stride;
      copy_row(out, p.type, bytes(p.prompt) + offset * size_of(p.prompt_type), p.prompt_type, s.hidden);
    } else {
      const int64_t t = r < layout.split ? r : r - layout.length;
      const char* later = token_row(b, std::min(t + kPrefetchRows, s.tokens - 1));
      for (int64_t at = 0; at < std::min(row_bytes, kPrefetchBytes); at += 64) __builtin_prefetch(later + at);
      memcpy(out, token_row(b, t), row_bytes);
    }
  }
}

// ----------------------------------------------------------------------------------------------- backward

bool prompt_backward_fits(const PromptEmbeddingBackwardParams& p) {
  const PromptSizes& s = p.sizes;
  for (int64_t b = 0; b < s.batch; ++b) {
    const PromptLayout& layout = p.layout[b];
    if (layout.first < 0 || layout.split < 0 || layout.length < 0) return false;
    if (layout.split > s.tokens || layout.length > s.prompt_rows || layout.first > s.prompt_rows - layout.length)
      return false;
  }
  return indices_fit(s, p.ids, p.task_ids);
}

void prompt_grad_rows(const PromptEmbeddingBackwardParams& p, int64_t begin, int64_t end) {
  with_float_type(p.type, [&](auto zero) {
    with_float_type(p.prompt_type, [&](auto out_zero) {
      const PromptSizes& s = p.sizes;
      Rows<decltype(zero)> rows;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t task = i / s.prompt_rows, row = i % s.prompt_rows;
        rows.clear();
        for (int64_t b = 0; b < s.batch; ++b) {
          const PromptLayout& layout = p.layout[b];
          if (row >= layout.length || value_at(p.task_ids, b, 0) != task) continue;
          rows.push_back(grad_row<decltype(zero)>(p, b, layout.first + layout.split + row));
        }
        sum_rows(static_cast<decltype(out_zero)*>(p.grad_prompt) + i * s.hidden, rows, s.hidden);
      }
    });
  });
}

void token_grad_rows(const PromptEmbeddingBackwardParams& p, int64_t begin, int64_t end) {
  with_bits_type(size_of(p.type), [&](auto zero) {
    using T = decltype(zero);
    const PromptSizes& s = p.sizes;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / s.tokens;
      const T* row = grad_row<T>(p, b, output_row(p.layout[b], i % s.tokens));
      std::copy_n(row, s.hidden, static_cast<T*>(p.grad_embeds) + i * s.hidden);
    }
  });
}

std::vector<TokenOccurrence> sorted_tokens(const PromptEmbeddingBackwardParams& p) {
  std::vector<TokenOccurrence> tokens(p.sizes.batch * p.sizes.tokens);
  for (int64_t i = 0; i < static_cast<int64_t>(tokens.size()); ++i) tokens[i] = {value_at(p.ids, i, 0), i};
  std::sort(tokens.begin(), tokens.end(), [](const TokenOccurrence& x, const TokenOccurrence& y) {
    return std::tie(x.id, x.token) < std::tie(y.id, y.token);
  });
  return tokens;
}

void weight_grad_rows(const PromptEmbeddingBackwardParams& p, const std::vector<TokenOccurrence>& tokens, int64_t begin,
                      int64_t end) {
  with_float_type(p.type, [&](auto zero) {
    using T = decltype(zero);
    const PromptSizes& s = p.sizes;
    Rows<T> rows;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t id = tokens[i].id;
      if (i > 0 && tokens[i - 1].id == id) continue;
      rows.clear();
      for (int64_t j = i; j < static_cast<int64_t>(tokens.size()) && tokens[j].id == id; ++j) {
        const int64_t b = tokens[j].token / s.tokens;
        rows.push_back(grad_row<T>(p, b, output_row(p.layout[b], tokens[j].token % s.tokens)));
      }
      sum_rows(static_cast<T*>(p.grad_weight) + id * s.hidden, rows, s.hidden);
    }
  });
}

}  // namespace lk::cpu
