// Layouts "int8" and "e4m3": a number of eight bits per weight, which the scale of its rectangle of weights multiplies.
#pragma once

#include "../device.h"
#include "../params/packed_weight.h"

namespace lk {

// The four numbers of a word.
struct Int8 {
  // The bits of an fp32 number of 2^23 and more hold an integer as it is, so that a byte is moved there and the number
  // is one subtraction: conversions have a quarter of its rate.
  LK_DEVICE static void decode(uint32_t word, float (&f)[4]) {
    constexpr uint32_t kIntegers = 0x4B000000u;  // 2^23
    const uint32_t from_lowest = word ^ 0x80808080u;
    LK_UNROLL
    for (int i = 0; i < 4; ++i)
      f[i] = float_of(permute_bytes(from_lowest, kIntegers, 0x7650u | i)) - (0x1p23f + 128.0f);
  }
};

struct E4M3 {
  // Exponent and fraction are moved to where fp32 has them, which is a factor of 2^(127 - 7), also of what is subnormal
  // here and then there; and the sign is copied from in front of them. Before sm_89 no instruction would do it.
  LK_DEVICE static void decode(uint32_t word, float (&f)[4]) {
    constexpr uint32_t kSignAndNumber = 0x87F00000u;
    LK_UNROLL
    for (int i = 0; i < 4; ++i) {
      const auto byte_on_top = static_cast<int32_t>(word << (24 - 8 * i));
      f[i] = float_of(static_cast<uint32_t>(byte_on_top >> 4) & kSignAndNumber) * 0x1p120f;
    }
    constexpr uint32_t kNumbers = 0x7F7F7F7Fu, kOnes = 0x01010101u;
    const uint32_t carried = ((word & kNumbers) + kOnes) & ~kNumbers;  // by the one number that is none
    if (carried == 0) return;
    LK_UNROLL
    for (int i = 0; i < 4; ++i) {
      if ((carried >> (8 * i) & 0x80u) != 0) f[i] = float_of(0x7FC00000u);
    }
  }
};

template <class Number>
struct Scaled {
  static constexpr int kBits = 8;

  // The weight of a byte.
  LK_DEVICE static void decode_byte(const PackedParts& w, int64_t i, float (&weights)[1]) {
    const auto row = static_cast<uint32_t>(i / w.k), column = static_cast<uint32_t>(i % w.k);
    float numbers[4];
    Number::decode(load_global(w.data + i), numbers);
    weights[0] =
        numbers[0] * scale(w, row / static_cast<uint32_t>(w.block_rows), column / static_cast<uint32_t>(w.block));
  }

  // Decodes the weights of a warp, from number `first` on. Scales come by way of the L1 cache: a warp has few.
  class Warp {
   public:
    static constexpr uint32_t kSharedBytes = 0;

    LK_DEVICE Warp(const PackedParts& w, uint32_t, int64_t first, int)
        : w_(w),
          row_bits_(bits_of_block(w.block_rows, w.n)),
          column_bits_(bits_of_block(w.block, w.k)),
          row_(static_cast<uint32_t>(first / w.k)),
          row_first_(-static_cast<uint32_t>(first % w.k)) {}

    // Those from i on, which have one scale, from their bytes. i is never less than the time before: then there is no
    // division, where rows are not shorter than what a warp has.
    template <int kCount>
    LK_DEVICE void decode(uint64_t packed, uint32_t i, float (&weights)[kCount]) {
      while (i - row_first_ >= static_cast<uint32_t>(w_.k)) {
        row_first_ += w_.k;
        ++row_;
      }
      const float factor = scale(w_, row_ >> row_bits_, (i - row_first_) >> column_bits_);
      LK_UNROLL
      for (int word = 0; word < kCount / 4; ++word) {
        float numbers[4];
        Number::decode(static_cast<uint32_t>(packed >> (32 * word)), numbers);
        LK_UNROLL
        for (int j = 0; j < 4; ++j) weights[word * 4 + j] = numbers[j] * factor;
      }
    }

   private:
    // By how many bits an index is shifted to be that of its block, a power of two or all there is.
    LK_DEVICE static uint32_t bits_of_block(int32_t block, int32_t size) {
      return block >= size ? 31 : count_ones(static_cast<uint32_t>(block - 1));
    }

    const PackedParts& w_;
    uint32_t row_bits_, column_bits_;
    uint32_t row_, row_first_;  // the row that is decoded, and which weight of the warp would be its first one
  };

 private:
  LK_DEVICE static float scale(const PackedParts& w, uint32_t row, uint32_t column) {
    return load_global(static_cast<const float*>(w.scales) + static_cast<int64_t>(row) * w.block_columns + column);
  }
};

}  // namespace lk
