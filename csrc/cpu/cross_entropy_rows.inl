// Cross entropy of rows of fp32 logits, and its gradient in their place: three passes over a row, which stays in a
// cache meanwhile. Included once per instruction set.
#include <math.h>

#include "../params/cross_entropy_rows.h"
#include "vector_math.h"

namespace lk::cpu {
namespace {

// f(v) for all vectors of a row, the last of which is filled up with `rest`; what f makes of v is stored if kStores.
template <bool kStores, class F>
LK_ALWAYS_INLINE inline void for_vectors(float* row, int64_t begin, int64_t end, float rest, const F& f) {
  int64_t c = begin;
  for (; c + kLanes <= end; c += kLanes) {
    const VecF v = f(load(row + c));
    if constexpr (kStores) store(row + c, v);
  }
  if (c == end) return;
  VecF v = broadcast(rest);
  memcpy(&v, row + c, sizeof(float) * (end - c));
  v = f(v);
  if constexpr (kStores) memcpy(row + c, &v, sizeof(float) * (end - c));
}

// A sum over a row: of vectors in fp32 within a block, of blocks in fp64.
template <class F>
LK_ALWAYS_INLINE inline double sum_of(float* row, int64_t columns, float rest, const F& f) {
  constexpr int64_t kBlock = 64 * kLanes;
  double total = 0.0;
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int64_t end = begin + kBlock < columns ? begin + kBlock : columns;
    VecF block = {};
    for_vectors<false>(row, begin, end, rest, [&](VecF v) {
      block += f(v);
      return v;
    });
    total += sum(block);
  }
  return total;
}

float largest(float* row, int64_t columns) {
  const float lowest = -__builtin_inff();
  VecF most = broadcast(lowest);
  for_vectors<false>(row, 0, columns, lowest, [&](VecF v) {
    most = v > most ? v : most;
    return v;
  });
  float found = lowest;
  for (int i = 0; i < kLanes; ++i) found = most[i] > found ? most[i] : found;
  return found;
}

void fill(float* row, int64_t columns, float value) {
  for (int64_t c = 0; c < columns; ++c) row[c] = value;
}

void cross_entropy_row(const CrossEntropyParams& p, int64_t m) {
  float* const z = p.logits + m * p.stride;
  const int64_t label = p.labels[m], columns = p.columns;
  const bool is_ignored = label == p.ignore_index;
  if (is_ignored || label < 0 || label >= columns) {
    const float value = is_ignored ? 0.0f : __builtin_nanf("");
    p.losses[m] = value;
    if (p.grad_losses != nullptr) fill(z, columns, value);
    return;
  }
  const float per_cap = p.softcap == 0.0f ? 0.0f : 1.0f / p.softcap;
  if (p.softcap != 0.0f) {
    for_vectors<true>(z, 0, columns, 0.0f, [&](VecF v) { return p.softcap * tanh(v * p.logit_scale * per_cap); });
  } else if (p.logit_scale != 1.0f) {
    for_vectors<true>(z, 0, columns, 0.0f, [&](VecF v) { return v * p.logit_scale; });
  }

  const float most = largest(z, columns), chosen = z[label], lowest = -__builtin_inff();
  const double total = sum_of(z, columns, lowest, [&](VecF v) { return exp_of_moderate(v - most); });
  double loss = (most - static_cast<double>(chosen)) + log(total);
  if (p.label_smoothing != 0.0f) {
    const double mean = sum_of(z, columns, 0.0f, [](VecF v) { return v; }) / static_cast<double>(columns);
    loss += p.label_smoothing * (chosen - mean);
  }
  p.losses[m] = static_cast<float>(loss);
  if (p.grad_losses == nullptr) return;

  const float grad = p.grad_losses[m], per_total = static_cast<float>(grad / total);
  const float everywhere = grad * p.label_smoothing / static_cast<float>(columns);
  const auto through_cap = [&](auto v) { return p.logit_scale * (1.0f - (v * per_cap) * (v * per_cap)); };
  if (p.softcap != 0.0f) {
    for_vectors<true>(z, 0, columns, lowest,
                      [&](VecF v) { return (exp_of_moderate(v - most) * per_total - everywhere) * through_cap(v); });
  } else {
    for_vectors<true>(z, 0, columns, lowest,
                      [&](VecF v) { return (exp_of_moderate(v - most) * per_total - everywhere) * p.logit_scale; });
  }
  z[label] -= grad * (1.0f - p.label_smoothing) * through_cap(chosen);
}

void cross_entropy_rows(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) cross_entropy_row(p, m);
}

}  // namespace
}  // namespace lk::cpu
