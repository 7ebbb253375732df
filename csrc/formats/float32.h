// fp32 in memory under 16-bit products: rounded on its way into shared memory. PEFT keeps adapters so.
#pragma once

#include "../device.h"

namespace lk {

// A format says how wide an element is in memory, and decodes a chunk of elements of the products. `valid` elements of
// it exist, the others are zero; where rows are aligned (kAligned), it is all or none.
template <class Element>
struct Float32Format {
  static constexpr int kElementBytes = 4, kChunkElements = 8;

  template <bool kAligned>
  LK_DEVICE static Vec16 decode(const unsigned char* source, int valid) {
    float f[kChunkElements];
    if (kAligned && valid > 0) {
      LK_UNROLL
      for (int half = 0; half < 2; ++half) {
        const Vec16 v = load_global(reinterpret_cast<const Vec16*>(source) + half);
        LK_UNROLL
        for (int j = 0; j < 4; ++j) f[half * 4 + j] = float_of(v.word[j]);
      }
    } else {
      LK_UNROLL
      for (int j = 0; j < kChunkElements; ++j) {
        f[j] = j < valid ? load_global(reinterpret_cast<const float*>(source) + j) : 0.0f;
      }
    }
    return {
        {Element::pack(f[0], f[1]), Element::pack(f[2], f[3]), Element::pack(f[4], f[5]), Element::pack(f[6], f[7])}};
  }
};

}  // namespace lk
