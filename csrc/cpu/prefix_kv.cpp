#include "prefix_kv.h"

#include "rows.h"

namespace lk::cpu {

void prefix_heads(const PrefixKvParams& p, int64_t begin, int64_t end) {
  const PrefixSizes& s = p.sizes;
  const int64_t element = size_of(p.type), head_bytes = s.tokens * s.head_dim * element;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t part = i / s.heads, head = i % s.heads;
    const char* const in = static_cast<const char*>(p.prefix) + i * s.head_dim * size_of(p.prefix_type);
    char* const out = static_cast<char*>(p.out) + (part * s.batch * s.heads + head) * head_bytes;
    for (int64_t t = 0; t < s.tokens; ++t) {
      copy_row(out + t * s.head_dim * element, p.type, in + t * p.prefix_stride * size_of(p.prefix_type), p.prefix_type,
               s.head_dim);
    }
    for (int64_t b = 1; b < s.batch; ++b) memcpy(out + b * s.heads * head_bytes, out, head_bytes);
  }
}

void prefix_grad_rows(const PrefixKvBackwardParams& p, int64_t begin, int64_t end) {
  with_float_type(p.type, [&](auto zero) {
    with_float_type(p.prefix_type, [&](auto out_zero) {
      using T = decltype(zero);
      const PrefixSizes& s = p.sizes;
      Rows<T> rows(s.batch);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t column = i / s.tokens, t = i % s.tokens, head = column % s.heads;
        const PrefixGrad& grad = p.grads[column / s.heads];
        const T* const first = static_cast<const T*>(grad.data) + head * grad.head_stride + t * grad.token_stride;
        for (int64_t b = 0; b < s.batch; ++b) rows[b] = first + b * grad.batch_stride;
        sum_rows(static_cast<decltype(out_zero)*>(p.grad_prefix) + t * p.grad_prefix_stride + column * s.head_dim, rows,
                 s.head_dim);
      }
    });
  });
}

}  // namespace lk::cpu
