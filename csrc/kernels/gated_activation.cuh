// activation(gate) * up and its gradients, element by element: 16 bytes of each tensor for a thread, in fp32 inside.
#pragma once

#include "../activations.h"
#include "../config/gated_activation.h"
#include "rows.cuh"

namespace lk {

// The functions that activations need, of one number.
struct ScalarMath {
  LK_DEVICE static float exp(float x) { return exponential(x); }
  LK_DEVICE static float erfc(float x) { return complementary_error(x); }
  LK_DEVICE static float constant(float f) { return f; }
  LK_DEVICE static float abs(float x) { return float_of(bits_of(x) & 0x7FFFFFFFu); }
  LK_DEVICE static float if_negative(float x, float a, float b) { return x < 0.0f ? a : b; }
};

LK_DEVICE Activated<float> activated(Activation activation, float x) {
  switch (activation) {
    case Activation::kSilu:
      return activated<Activation::kSilu, ScalarMath>(x);
    case Activation::kGelu:
      return activated<Activation::kGelu, ScalarMath>(x);
    case Activation::kGeluTanh:
      return activated<Activation::kGeluTanh, ScalarMath>(x);
    default:
      return activated<Activation::kRelu, ScalarMath>(x);
  }
}

// The first element of a thread; there is none from `count` on.
template <int kGroup>
LK_DEVICE int64_t gated_element() {
  return (static_cast<int64_t>(block_index()) * kGatedThreads + thread_index()) * kGroup;
}

template <class Element_, bool kAligned_>
struct GatedActivation {
  using Element = Element_;
  static constexpr bool kAligned = kAligned_;
  static constexpr int kThreads = kGatedThreads, kMinBlocks = 4, kSharedBytes = 0;

  LK_DEVICE static void run(const GatedActivationParams& p) {
    const int64_t i = gated_element<kGroup>();
    if (i >= p.count) return;
    float gate[kGroup], up[kGroup];
    Elements<Element>::load(static_cast<const Bits*>(p.gate) + i, gate);
    Elements<Element>::load(static_cast<const Bits*>(p.up) + i, up);
    LK_UNROLL
    for (int j = 0; j < kGroup; ++j) gate[j] = activated(p.activation, gate[j]).value * up[j];
    Elements<Element>::store(static_cast<Bits*>(p.h) + i, gate);
  }

 private:
  using Bits = typename Elements<Element>::Bits;
  static constexpr int kGroup = kAligned ? kChunkBytes / sizeof(Bits) : 1;
};

template <class Element_, bool kAligned_>
struct GatedActivationBackward {
  using Element = Element_;
  static constexpr bool kAligned = kAligned_;
  static constexpr int kThreads = kGatedThreads, kMinBlocks = 4, kSharedBytes = 0;

  LK_DEVICE static void run(const GatedActivationBackwardParams& p) {
    const int64_t i = gated_element<kGroup>();
    if (i >= p.count) return;
    float grad[kGroup], gate[kGroup], up[kGroup];
    Elements<Element>::load(static_cast<const Bits*>(p.grad_h) + i, grad);
    Elements<Element>::load(static_cast<const Bits*>(p.gate) + i, gate);
    Elements<Element>::load(static_cast<const Bits*>(p.up) + i, up);
    LK_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      const Activated<float> of_gate = activated(p.activation, gate[j]);
      gate[j] = grad[j] * up[j] * of_gate.slope;
      up[j] = grad[j] * of_gate.value;
    }
    Elements<Element>::store(static_cast<Bits*>(p.grad_gate) + i, gate);
    Elements<Element>::store(static_cast<Bits*>(p.grad_up) + i, up);
  }

 private:
  using Bits = typename Elements<Element>::Bits;
  static constexpr int kGroup = kAligned ? kChunkBytes / sizeof(Bits) : 1;
};

template <class Variant>
LK_KERNEL(Variant::kThreads, Variant::kMinBlocks)
gated_activation_kernel(const GatedActivationParams p) {
  Variant::run(p);
}

template <class Variant>
LK_KERNEL(Variant::kThreads, Variant::kMinBlocks)
gated_activation_backward_kernel(const GatedActivationBackwardParams p) {
  Variant::run(p);
}

}  // namespace lk
