// Layout "codes4": four bits name one of 16 codes, which the scale of the weight's block multiplies. NF4 and FP4 are
// two tables of codes.
#pragma once

#include "../device.h"
#include "../params/packed_weight.h"

namespace lk {

struct Codes4 {
  static constexpr int kBits = 4, kCodes = 16, kWordWeights = 32 / kBits;
  static constexpr uint32_t kTableBytes = kCodes * sizeof(float);

  // The scale of a block of weights. Quantised scales are decoded by two operations that each round, as whoever
  // quantised them did: one fused operation differs in the last bit of some.
  //
  // code2 is read by way of the L1 cache, which its 1 KB soon is in. Shared memory would have no fewer conflicts, since
  // the scales of a warp are 32 codes at random, and every block would have to copy the table there and wait for it.
  LK_DEVICE static float scale(const Codes4Weight& w, int64_t block) {
    if (w.scales2 == nullptr) return load_global(static_cast<const float*>(w.scales) + block);
    const float code = load_global(w.code2 + load_global(static_cast<const uint8_t*>(w.scales) + block));
    return rounded_sum(rounded_product(code, load_global(w.scales2 + block / kScalesPerScale2)), load_global(w.offset));
  }

  // The code of weight i of the eight in a word, from the table at `codes` in shared memory, which begins at a multiple
  // of its size. 16 words lie in 16 banks, so that no two lanes ever ask one bank for different words. A weight costs a
  // shift, an operation that masks and adds the table's address, and the load: byte planes in registers (prmt) would
  // cost five operations and a half, because all four bytes of an fp32 code are wanted; a shuffle, as many as the load
  // and a register of codes.
  LK_DEVICE static float code(uint32_t codes, uint32_t word, int i) {
    const int low = i / 2 * 8 + (i % 2 == 0 ? kBits : 0), two = 2;  // where its bits are, and of a word's bytes
    const uint32_t offset = (low == 0 ? word << two : word >> (low - two)) & (kTableBytes - sizeof(float));
    return float_of(load_shared_4(codes | offset));
  }

  // The same from memory, for a weight that is even in its byte or not.
  LK_DEVICE static float code(const Codes4Weight& w, uint8_t byte, bool odd) {
    return load_global(w.code + (odd ? byte & (kCodes - 1) : byte >> kBits));
  }
};

// The codes, rounded to 16 bits, as byte planes in eight registers: what a product of tensor cores takes as they are,
// and leaves the scale for its sum. That saves the multiplication and the rounding of every weight. A rounded code
// times a scale in fp32 is within an ulp of the weight, which is rounded itself, and on average as far from it as that
// from the code times its scale.
template <class Element>
class CodePlanes {
 public:
  LK_DEVICE explicit CodePlanes(const float* code) {
    LK_UNROLL
    for (int i = 0; i < 4; ++i) {
      uint32_t pairs[2];
      LK_UNROLL
      for (int j = 0; j < 2; ++j) {
        const float* two = code + i * 4 + j * 2;
        pairs[j] = Element::pack(load_global(two), load_global(two + 1));
      }
      low_[i] = permute_bytes(pairs[0], pairs[1], 0x6420);
      high_[i] = permute_bytes(pairs[0], pairs[1], 0x7531);
    }
  }

  // The eight weights of a word: pairs[i] holds 2 i and 2 i + 1, the first in its low half.
  //
  // A selector is three bits of each of four weights; the fourth chooses between the results for the lower and the
  // upper eight codes. Of a weight's bits, the first weight of a byte has the upper ones: the pairs are put together in
  // that order.
  LK_DEVICE void decode(uint32_t word, uint32_t (&pairs)[4]) const {
    uint32_t in_eight = word & 0x77777777u, which_eight = (word >> 1 & 0x44444444u) | 0x32103210u;
    LK_UNROLL
    for (int half = 0; half < 2; ++half) {
      const uint32_t low = look_up(low_, in_eight, which_eight), high = look_up(high_, in_eight, which_eight);
      pairs[2 * half] = permute_bytes(low, high, 0x4051);
      pairs[2 * half + 1] = permute_bytes(low, high, 0x6273);
      in_eight >>= 16;
      which_eight >>= 16;
    }
  }

 private:
  LK_DEVICE static uint32_t look_up(const uint32_t (&plane)[4], uint32_t in_eight, uint32_t which_eight) {
    return permute_bytes(permute_bytes(plane[0], plane[1], in_eight), permute_bytes(plane[2], plane[3], in_eight),
                         which_eight);
  }

  uint32_t low_[4], high_[4];  // bytes of codes 4 i to 4 i + 3
};

}  // namespace lk
