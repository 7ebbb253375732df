// Layouts "codes4" and "codes4_low": four bits name one of 16 codes, which the scale of the weight's block multiplies.
// NF4 and FP4 are two tables of codes.
#pragma once

#include "../config/dequantize.h"
#include "../params/packed_weight.h"
#include "../tile.h"

namespace lk {

// The scale of a block of weights. Quantised scales are decoded by two operations that each round, as whoever quantised
// them did: one fused operation differs in the last bit of some.
//
// code2 is read by way of the L1 cache, which its 1 KB soon is in. Shared memory would have no fewer conflicts, since
// the scales of a warp are 32 codes at random, and every block would have to copy the table there and wait for it.
LK_DEVICE float codes4_scale(const PackedParts& w, int64_t block) {
  if (w.scales2 == nullptr) return load_global(static_cast<const float*>(w.scales) + block);
  const float code = load_global(w.code2 + load_global(static_cast<const uint8_t*>(w.scales) + block));
  return rounded_sum(rounded_product(code, load_global(w.scales2 + block / kScalesPerScale2)), load_global(w.offset));
}

// kEvenIsLow: "codes4_low".
template <bool kEvenIsLow>
struct Codes4 {
  static constexpr int kBits = 4, kCodes = 16;
  static constexpr uint32_t kTableBytes = kCodes * sizeof(float);

  // The code of weight i of the eight in a word, from the table at `codes` in shared memory, which begins at a multiple
  // of its size. 16 words lie in 16 banks, so that no two lanes ever ask one bank for different words. A weight costs a
  // shift, an operation that masks and adds the table's address, and the load: byte planes in registers (prmt) would
  // cost five operations and a half, because all four bytes of an fp32 code are wanted; a shuffle, as many as the load
  // and a register of codes.
  LK_DEVICE static float code(uint32_t codes, uint32_t word, int i) {
    constexpr int kCodeBytesLog2 = 2;
    const int low = i / 2 * 8 + (i % 2 == kEvenIsLow ? kBits : 0);  // where its bits are
    const uint32_t in_place = low == 0 ? word << kCodeBytesLog2 : word >> (low - kCodeBytesLog2);
    const uint32_t offset = in_place & (kTableBytes - sizeof(float));
    return float_of(load_shared_4(codes | offset));
  }

  // The two weights of a byte, whose first is number i.
  LK_DEVICE static void decode_byte(const PackedParts& w, int64_t i, float (&weights)[2]) {
    const float factor = codes4_scale(w, i / w.block);
    const uint32_t byte = load_global(w.data + i / 2);
    weights[kEvenIsLow] = load_global(w.code + (byte >> kBits)) * factor;
    weights[!kEvenIsLow] = load_global(w.code + (byte & (kCodes - 1))) * factor;
  }

  // Decodes the weights of a warp, from number `first` on, with their scales and the codes in its shared memory.
  class Warp {
   public:
    static constexpr uint32_t kScalesBytes = kWarpPackedBytes * (8 / kBits) / kLeastWholeBlock * sizeof(float);
    static constexpr uint32_t kSharedBytes = kScalesBytes + kTableBytes;
    static_assert(kWarpPackedBytes % kTableBytes == 0 && kScalesBytes % kTableBytes == 0,
                  "every warp's table begins at a multiple of its size");

    LK_DEVICE Warp(const PackedParts& w, uint32_t smem, int64_t first, int count)
        : scales_(smem), codes_(smem + kScalesBytes), block_bits_(count_ones(static_cast<uint32_t>(w.block - 1))) {
      const int blocks = ((count - 1) >> block_bits_) + 1, lane = thread_index() % kWarp;
      LK_NO_UNROLL
      for (int i = lane; i < blocks; i += kWarp)
        store_shared_4(scales_ + i * 4, bits_of(codes4_scale(w, (first >> block_bits_) + i)));
      if (lane < kCodes) store_shared_4(codes_ + lane * 4, bits_of(load_global(w.code + lane)));
    }

    // Those from i on, which have one scale, from their bytes.
    template <int kCount>
    LK_DEVICE void decode(uint64_t packed, uint32_t i, float (&weights)[kCount]) {
      const float factor = float_of(load_shared_4(scales_ + (i >> block_bits_) * 4));
      LK_UNROLL
      for (int j = 0; j < kCount; ++j) weights[j] = code(codes_, static_cast<uint32_t>(packed), j) * factor;
    }

   private:
    uint32_t scales_, codes_, block_bits_;
  };
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
