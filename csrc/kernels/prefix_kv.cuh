// A trainable prefix as keys and values, and its gradient. A thread moves one group of neighbouring elements, which are
// neighbours on both sides: rows of a head are contiguous in the prefix and in the keys and values.
#pragma once

#include "../config/prefix_kv.h"
#include "rows.cuh"

namespace lk {

// Where a thread's group lies: in row `row` of its part, [heads * tokens, head_dim].
struct PrefixGroup {
  int part, row, head, token, column;
  bool exists;
};

LK_DEVICE PrefixGroup prefix_group_of_thread(const PrefixSizes& s, int group) {
  const int blocks = static_cast<int>(prefix_blocks(s, group));
  const int per_row = static_cast<int>(blocks_of(s.head_dim, group)), tokens = static_cast<int>(s.tokens);
  const int i = block_index() % blocks * kPrefixThreads + thread_index(), row = i / per_row;
  return {.part = block_index() / blocks,
          .row = row,
          .head = row / tokens,
          .token = row % tokens,
          .column = i % per_row * group,
          .exists = row < s.heads * s.tokens};
}

template <class Element_, bool kAligned_>
struct PrefixKv {
  using Element = Element_;
  static constexpr bool kAligned = kAligned_;
  static constexpr int kThreads = kPrefixThreads, kMinBlocks = 8, kSharedBytes = 0;

  LK_DEVICE static void run(const PrefixKvParams& p) {
    if (p.prefix_type == p.type) {
      using Unit = typename CopyUnit<Bits, kAligned>::Type;
      write<sizeof(Unit) / sizeof(Bits), Bits>(
          p, [](const Bits* source) { return load_global(reinterpret_cast<const Unit*>(source)); });
    } else if constexpr (sizeof(Bits) == 2) {
      constexpr int kGroup = kAligned ? 4 : 1;
      write<kGroup, float>(p, [](const float* source) {
        float f[kGroup];
        Elements<Float32>::load(source, f);
        return Elements<Element>::packed(f);
      });
    }
  }

 private:
  using Bits = typename Elements<Element>::Bits;

  // The group is read once, and written for every sample.
  template <int kGroup, class Source, class Load>
  LK_DEVICE static void write(const PrefixKvParams& p, const Load& load) {
    const PrefixSizes& s = p.sizes;
    const PrefixGroup at = prefix_group_of_thread(s, kGroup);
    if (!at.exists) return;
    const auto unit = load(static_cast<const Source*>(p.prefix) + at.token * p.prefix_stride +
                           (at.part * s.heads + at.head) * s.head_dim + at.column);
    const int64_t sample = s.heads * s.tokens * s.head_dim;
    Bits* const out = static_cast<Bits*>(p.out) + at.part * s.batch * sample + at.row * s.head_dim + at.column;
    LK_NO_UNROLL
    for (int b = 0; b < s.batch; ++b) store_global(reinterpret_cast<decltype(load(nullptr))*>(out + b * sample), unit);
  }
};

template <class Element_, bool kAligned_>
struct PrefixKvBackward {
  using Element = Element_;
  static constexpr bool kAligned = kAligned_;
  static constexpr int kThreads = kPrefixThreads, kMinBlocks = 4, kSharedBytes = 0;

  LK_DEVICE static void run(const PrefixKvBackwardParams& p) {
    if constexpr (sizeof(Bits) == 2 && kAligned) {
      if (p.prefix_type == p.type) return sum<8>(p);
    }
    sum<kAligned ? 4 : 1>(p);
  }

 private:
  using Bits = typename Elements<Element>::Bits;
  static constexpr int kBatch = 4;  // samples under way at a time

  template <int kGroup>
  LK_DEVICE static void sum(const PrefixKvBackwardParams& p) {
    const PrefixSizes& s = p.sizes;
    const PrefixGroup at = prefix_group_of_thread(s, kGroup);
    if (!at.exists) return;
    const PrefixGrad& grad = p.grads[at.part];
    const Bits* const first =
        static_cast<const Bits*>(grad.data) + at.head * grad.head_stride + at.token * grad.token_stride + at.column;
    float total[kGroup] = {};
    LK_NO_UNROLL
    for (int b0 = 0; b0 < s.batch; b0 += kBatch) {
      float terms[kBatch][kGroup] = {};
      LK_UNROLL
      for (int j = 0; j < kBatch; ++j) {
        if (b0 + j < s.batch) Elements<Element>::load(first + (b0 + j) * grad.batch_stride, terms[j]);
      }
      LK_UNROLL
      for (int j = 0; j < kBatch; ++j) {
        LK_UNROLL
        for (int i = 0; i < kGroup; ++i) total[i] += terms[j][i];
      }
    }
    const int64_t to = at.token * p.grad_prefix_stride + (at.part * s.heads + at.head) * s.head_dim + at.column;
    if constexpr (kGroup < 8) {
      if (p.prefix_type == FloatType::kFloat32) {
        return Elements<Float32>::store(static_cast<float*>(p.grad_prefix) + to, total);
      }
    }
    Elements<Element>::store(static_cast<Bits*>(p.grad_prefix) + to, total);
  }
};

template <class Variant>
LK_KERNEL(Variant::kThreads, Variant::kMinBlocks)
prefix_kv_kernel(const PrefixKvParams p) {
  Variant::run(p);
}

template <class Variant>
LK_KERNEL(Variant::kThreads, Variant::kMinBlocks)
prefix_kv_backward_kernel(const PrefixKvBackwardParams p) {
  Variant::run(p);
}

}  // namespace lk
