// Cross entropy of rows of logits, and its gradient in their place. A block has a row, which it reads once for the loss
// and once more for the gradient; by then it lies in the L2 cache, as far as that holds the rows under way.
#pragma once

#include <math.h>

#include "../config/cross_entropy_rows.h"
#include "rows.cuh"

namespace lk {

// Σ exp(z) of some z is total · exp(most), most their largest; and Σ z.
struct Sums {
  float most = -kInfinity, total = 0.0f, linear = 0.0f;

  static constexpr float kInfinity = __builtin_huge_valf();

  // Where nothing, or -inf alone, has been added, no difference of infinities is formed. A NaN stays in the total.
  LK_DEVICE void add(const Sums& other) {
    const float larger = other.most > most ? other.most : most, base = larger == -kInfinity ? 0.0f : larger;
    total = total * expf(most - base) + other.total * expf(other.most - base);
    most = larger;
    linear += other.linear;
  }

  template <int kCount>
  LK_DEVICE void add(const float (&z)[kCount]) {
    float larger = most;
    LK_UNROLL
    for (int i = 0; i < kCount; ++i) larger = z[i] > larger ? z[i] : larger;
    const float base = larger == -kInfinity ? 0.0f : larger;
    total *= expf(most - base);
    LK_UNROLL
    for (int i = 0; i < kCount; ++i) {
      total += expf(z[i] - base);
      linear += z[i];
    }
    most = larger;
  }
};

template <class Element_, bool kAligned_>
struct CrossEntropyRows {
  using Element = Element_;  // of the gradient
  static constexpr bool kAligned = kAligned_;
  static constexpr int kThreads = kCrossEntropyThreads, kMinBlocks = 2, kSharedBytes = (kThreads + kWarp) * 16;

  LK_DEVICE static void run(const CrossEntropyParams& p) {
    const int64_t row = block_index();
    float* const logits = p.logits + row * p.stride;
    const int64_t label = load_global(p.labels + row);
    const bool is_ignored = label == p.ignore_index;
    if (is_ignored || label < 0 || label >= p.columns) {
      const float value = is_ignored ? 0.0f : float_of(0x7FC00000u);
      if (thread_index() == 0) store_global(p.losses + row, value);
      if (p.grad_losses != nullptr) fill(p, logits, value);
      return;
    }
    const float chosen = score(p, load_global(logits + label));
    const Sums sums = sums_of_row(p, logits);
    if (thread_index() == 0) {
      const float mean = sums.linear / static_cast<float>(p.columns);
      const float smoothing = p.label_smoothing == 0.0f ? 0.0f : p.label_smoothing * (chosen - mean);
      store_global(p.losses + row, (sums.most - chosen) + logf(sums.total) + smoothing);
    }
    if (p.grad_losses != nullptr) write_gradient(p, logits, label, sums, load_global(p.grad_losses + row));
  }

 private:
  using Bits = typename Elements<Element>::Bits;
  static constexpr int kGroup = kAligned ? 4 : 1;     // neighbours, which one load brings
  static constexpr int kBatch = kAligned ? 2 : 4;     // loads under way
  static constexpr int kStep = kThreads * kGroup;     // columns of a block's load
  static constexpr int kColumns = kBatch * kStep;     // of an iteration
  static constexpr bool kNarrows = sizeof(Bits) < 4;  // then the gradient begins to overwrite what was not read yet

  LK_DEVICE static float score(const CrossEntropyParams& p, float logit) {
    const float z = logit * p.logit_scale;
    return p.softcap == 0.0f ? z : p.softcap * tanhf(z / p.softcap);
  }

  LK_DEVICE static int column(int first, int i) { return first + i * kStep + thread_index() * kGroup; }

  // f(first, logits of this thread) for one iteration after the other. All threads call it; f takes turns with loads.
  template <class F>
  LK_DEVICE static void for_groups(const CrossEntropyParams& p, const float* logits, const F& f) {
    LK_NO_UNROLL
    for (int first = 0; first < p.columns; first += kColumns) {
      float z[kBatch][kGroup];
      LK_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        if (column(first, i) < p.columns) Elements<Float32>::load(logits + column(first, i), z[i]);
      }
      f(first, z);
    }
  }

  LK_DEVICE static Sums sums_of_row(const CrossEntropyParams& p, const float* logits) {
    Sums sums;
    for_groups(p, logits, [&](int first, float(&z)[kBatch][kGroup]) {
      LK_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        if (column(first, i) >= p.columns) continue;
        LK_UNROLL
        for (int j = 0; j < kGroup; ++j) z[i][j] = score(p, z[i][j]);
        sums.add(z[i]);
      }
    });
    return of_block(sums);
  }

  // All threads' sums, in their order: one warp adds up every 32nd, then every thread what the warp has.
  LK_DEVICE static Sums of_block(const Sums& sums) {
    const uint32_t all_smem = dynamic_shared(), warp_smem = all_smem + kThreads * 16;
    put(all_smem + thread_index() * 16, sums);
    sync_block();
    if (thread_index() < kWarp) {
      Sums mine;
      LK_NO_UNROLL
      for (int t = thread_index(); t < kThreads; t += kWarp) mine.add(got(all_smem + t * 16));
      put(warp_smem + thread_index() * 16, mine);
    }
    sync_block();
    Sums all;
    LK_NO_UNROLL
    for (int t = 0; t < kWarp; ++t) all.add(got(warp_smem + t * 16));
    return all;
  }

  LK_DEVICE static void put(uint32_t address, const Sums& sums) {
    store_shared_16(address, Vec16{{bits_of(sums.most), bits_of(sums.total), bits_of(sums.linear), 0}});
  }
  LK_DEVICE static Sums got(uint32_t address) {
    const Vec16 v = load_shared_16(address);
    return {float_of(v.word[0]), float_of(v.word[1]), float_of(v.word[2])};
  }

  LK_DEVICE static void write_gradient(const CrossEntropyParams& p, float* logits, int64_t label, const Sums& sums,
                                       float grad) {
    Bits* const gradient = reinterpret_cast<Bits*>(logits);
    const float per_total = grad / sums.total, everywhere = grad * p.label_smoothing / static_cast<float>(p.columns);
    const float there = grad * (1.0f - p.label_smoothing);
    for_groups(p, logits, [&](int first, float(&z)[kBatch][kGroup]) {
      if constexpr (kNarrows) sync_block();  // these columns were read by all; others lie behind what is written now
      LK_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        if (column(first, i) >= p.columns) continue;
        LK_UNROLL
        for (int j = 0; j < kGroup; ++j) {
          const float s = score(p, z[i][j]), capped = p.softcap == 0.0f ? 0.0f : s / p.softcap;
          const float at_label = column(first, i) + j == label ? there : 0.0f;
          z[i][j] =
              (expf(s - sums.most) * per_total - everywhere - at_label) * (p.logit_scale * (1.0f - capped * capped));
        }
        Elements<Element>::store(gradient + column(first, i), z[i]);
      }
    });
  }

  LK_DEVICE static void fill(const CrossEntropyParams& p, float* logits, float value) {
    Bits* const gradient = reinterpret_cast<Bits*>(logits);
    float f[kGroup];
    LK_UNROLL
    for (int j = 0; j < kGroup; ++j) f[j] = value;
    LK_NO_UNROLL
    for (int c = thread_index() * kGroup; c < p.columns; c += kStep) Elements<Element>::store(gradient + c, f);
  }
};

template <class Variant>
LK_KERNEL(Variant::kThreads, Variant::kMinBlocks)
cross_entropy_rows_kernel(const CrossEntropyParams p) {
  Variant::run(p);
}

}  // namespace lk
