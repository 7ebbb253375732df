// The activations of gated MLPs with their slopes, as one definition for CUDA and for the vectors of the CPU kernels:
// `Math` has the functions of a number or of a vector of them; if_negative(x, a, b) is a where x < 0, else b.
#pragma once

#include "host_device.h"
#include "params/gated_activation.h"

namespace lk {

template <class F>
struct Activated {
  F value, slope;
};

// 1 / (1 + exp(-z)), and what it lacks to 1: neither overflows, nor is the difference of numbers that nearly agree.
template <class F>
struct Sigmoid {
  F value, rest;
};

template <class Math, class F>
LK_HOST_DEVICE Sigmoid<F> sigmoid(F z) {
  const F small = Math::exp(-Math::abs(z)), larger = 1.0f / (1.0f + small), smaller = small * larger;
  return {Math::if_negative(z, smaller, larger), Math::if_negative(z, larger, smaller)};
}

// Of x. (1 + tanh(u)) / 2 is the sigmoid of 2 u.
template <Activation kActivation, class Math, class F>
LK_HOST_DEVICE Activated<F> activated(F x) {
  if constexpr (kActivation == Activation::kSilu) {
    const Sigmoid<F> s = sigmoid<Math>(x);
    return {x * s.value, s.value * (1.0f + x * s.rest)};
  } else if constexpr (kActivation == Activation::kGelu) {
    constexpr float kInverseRootTwo = 0.70710678f, kInverseRootTwoPi = 0.39894228f;
    const F density = kInverseRootTwoPi * Math::exp(-0.5f * x * x);
    const F below = 0.5f * Math::erfc(-kInverseRootTwo * x);  // the share of a normal distribution below x
    return {x * below, below + x * density};
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    constexpr float kTwiceRootTwoOverPi = 1.5957691f, kCubic = 0.044715f;
    const F square = x * x;
    const Sigmoid<F> s = sigmoid<Math>(kTwiceRootTwoOverPi * x * (1.0f + kCubic * square));
    const F slope_of_argument = kTwiceRootTwoOverPi * (1.0f + 3.0f * kCubic * square);
    return {x * s.value, s.value + x * s.value * s.rest * slope_of_argument};
  } else {
    static_assert(kActivation == Activation::kRelu);
    const F zero = Math::constant(0.0f);
    return {Math::if_negative(x, zero, x), Math::if_negative(-x, Math::constant(1.0f), x - x)};
  }
}

// f.operator()<kActivation>().
template <class F>
auto with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kSilu:
      return f.template operator()<Activation::kSilu>();
    case Activation::kGelu:
      return f.template operator()<Activation::kGelu>();
    case Activation::kGeluTanh:
      return f.template operator()<Activation::kGeluTanh>();
    default:
      return f.template operator()<Activation::kRelu>();
  }
}

}  // namespace lk
