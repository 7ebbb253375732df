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

}  // namespace lk
