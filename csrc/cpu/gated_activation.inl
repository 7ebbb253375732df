// activation(gate) * up and its gradients, in fp32 inside. Included once per instruction set; LK_GATED_TABLE names the
// table it defines.
#include "../activations.h"
#include "float_types.h"
#include "gated_activation.h"
#include "vector_math.h"

namespace lk::cpu {
namespace {

struct VectorMath {
  static VecF exp(VecF x) { return cpu::exp(x); }
  static VecF erfc(VecF x) { return cpu::erfc(x); }
  static VecF constant(float f) { return broadcast(f); }
  static VecF abs(VecF x) { return and_bits(x, broadcast(0x7FFFFFFFu)); }
  static VecF if_negative(VecF x, VecF a, VecF b) { return select(x < 0.0f, a, b); }
};

// Elements on their way through registers: what is neither fp32 nor whole vectors is by way of a buffer.
constexpr int kBlock = 4 * kLanes;

template <class T>
inline void read_block(const T* from, int count, float (&to)[kBlock]) {
  if (count == kBlock) {
    for (int i = 0; i < kBlock; ++i) to[i] = to_float(from[i]);
  } else {
    for (int i = 0; i < kBlock; ++i) to[i] = i < count ? to_float(from[i]) : 0.0f;
  }
}

template <class T>
inline void write_block(T* to, int count, const float (&from)[kBlock]) {
  if (count == kBlock) {
    for (int i = 0; i < kBlock; ++i) to[i] = from_float<T>(from[i]);
  } else {
    for (int i = 0; i < count; ++i) to[i] = from_float<T>(from[i]);
  }
}

template <Activation kActivation, class T>
void forward_of(const GatedActivationParams& p, int64_t begin, int64_t end) {
  const T *gate = static_cast<const T*>(p.gate), *up = static_cast<const T*>(p.up);
  T* const h = static_cast<T*>(p.h);
  float a[kBlock], b[kBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int count = static_cast<int>(end - first < kBlock ? end - first : kBlock);
    read_block(gate + first, count, a);
    read_block(up + first, count, b);
    for (int i = 0; i < kBlock; i += kLanes) {
      store(a + i, activated<kActivation, VectorMath>(load(a + i)).value * load(b + i));
    }
    write_block(h + first, count, a);
  }
}

template <Activation kActivation, class T>
void backward_of(const GatedActivationBackwardParams& p, int64_t begin, int64_t end) {
  const T *grad_h = static_cast<const T*>(p.grad_h), *gate = static_cast<const T*>(p.gate),
          *up = static_cast<const T*>(p.up);
  T *const grad_gate = static_cast<T*>(p.grad_gate), *const grad_up = static_cast<T*>(p.grad_up);
  float grad[kBlock], a[kBlock], b[kBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int count = static_cast<int>(end - first < kBlock ? end - first : kBlock);
    read_block(grad_h + first, count, grad);
    read_block(gate + first, count, a);
    read_block(up + first, count, b);
    for (int i = 0; i < kBlock; i += kLanes) {
      const Activated<VecF> of_gate = activated<kActivation, VectorMath>(load(a + i));
      const VecF g = load(grad + i);
      store(a + i, g * load(b + i) * of_gate.slope);
      store(b + i, g * of_gate.value);
    }
    write_block(grad_gate + first, count, a);
    write_block(grad_up + first, count, b);
  }
}

template <class F>
void with_type(FloatType type, const F& f) {
  if (type == FloatType::kBFloat16) return f(BFloat16{});
  if (type == FloatType::kFloat16) return f(Float16{});
  return f(float{});
}

void gated_forward(const GatedActivationParams& p, int64_t begin, int64_t end) {
  with_activation(p.activation, [&]<Activation kActivation>() {
    with_type(p.type, [&](auto zero) { forward_of<kActivation, decltype(zero)>(p, begin, end); });
  });
}

void gated_backward(const GatedActivationBackwardParams& p, int64_t begin, int64_t end) {
  with_activation(p.activation, [&]<Activation kActivation>() {
    with_type(p.type, [&](auto zero) { backward_of<kActivation, decltype(zero)>(p, begin, end); });
  });
}

}  // namespace

extern const GatedActivationKernels LK_GATED_TABLE;
const GatedActivationKernels LK_GATED_TABLE = {.forward = gated_forward, .backward = gated_backward};

}  // namespace lk::cpu
