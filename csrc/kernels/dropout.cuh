// The dropout mask within kernels. A mask is never stored: whoever needs it computes it from the seed.
#pragma once

#include "../philox.h"
#include "../tile.h"

namespace lk {

// The mask of a matrix with `columns` columns.
struct DropoutMask {
  int64_t groups_per_row;
  uint64_t seed;
  uint32_t threshold;

  // params: those of a launch that drops something.
  template <class Params>
  LK_DEVICE DropoutMask(const Params& p, int columns)
      : groups_per_row(dropout_groups_per_row(columns)),
        seed(static_cast<uint64_t>(load_global(p.seed)) + p.seed_step),
        threshold(p.dropout_threshold) {}

  LK_DEVICE PhiloxWords words(int row, int column) const {
    return philox4x32(static_cast<uint64_t>(row * groups_per_row + column / kDropoutGroup), seed);
  }
};

// Which row of the matrix a tile's row is: they follow each other, or stand in an order, which ends.
struct NextRows {
  int first;
  LK_DEVICE int operator()(int row) const { return first + row; }
};
struct OrderedRows {
  const int32_t* order;
  int first, end;
  LK_DEVICE int operator()(int row) const { return first + row < end ? load_global(order + first + row) : 0; }
};

// Zeroes what is dropped in a tile in shared memory, whose columns are the matrix' from column0 on. A Philox group is
// one chunk of 16-bit elements, or two of 32-bit ones.
template <class Tile, int kRows, int kThreads, class Rows>
LK_DEVICE void drop_tile(uint32_t smem, const Rows& row_of, int column0, const DropoutMask& mask) {
  constexpr int kGroupChunks = kDropoutGroup / Tile::kChunkElements, kGroups = Tile::kChunks / kGroupChunks;
  for (int i = thread_index(); i < kRows * kGroups; i += kThreads) {
    const int row = i / kGroups, group = i % kGroups;
    PhiloxWords words = mask.words(row_of(row), column0 + group * kDropoutGroup);
    // Of two chunks, half of the threads that access memory together take the second one first: other banks.
    const int first = kGroupChunks == 1 ? 0 : i >> 2 & 1;
    if (first == 1) words = {{words.word[2], words.word[3], words.word[0], words.word[1]}};
    const auto kept = [&](int element) { return dropout_bits(words, element) >= mask.threshold; };
    LK_UNROLL
    for (int chunk = 0; chunk < kGroupChunks; ++chunk) {
      const uint32_t address = smem + Tile::offset(row, group * kGroupChunks + (chunk ^ first));
      Vec16 v = load_shared_16(address);
      LK_UNROLL
      for (int j = 0; j < 4; ++j) {
        if constexpr (kGroupChunks == 1) {
          v.word[j] &= (kept(2 * j) ? 0x0000FFFFu : 0u) | (kept(2 * j + 1) ? 0xFFFF0000u : 0u);
        } else {
          v.word[j] = kept(4 * chunk + j) ? v.word[j] : 0u;
        }
      }
      store_shared_16(address, v);
    }
  }
}

// The mask of a [kRows, kColumns] tile in shared memory, one bit per element: 1 is kept.
template <int kRows, int kColumns>
struct KeepBits {
  static constexpr int kWords = kColumns / 32;
  static constexpr int kBytes = kRows * kWords * 4;

  LK_DEVICE static uint32_t word(uint32_t smem, int row, int column) {
    return load_shared_4(smem + (row * kWords + column / 32) * 4);
  }

  // By kThreads threads, of which this is the first, second, ...
  template <int kThreads, class Rows>
  LK_DEVICE static void compute(uint32_t smem, const Rows& row_of, int column0, const DropoutMask& mask,
                                int thread = thread_index()) {
    LK_NO_UNROLL
    for (int i = thread; i < kRows * kWords; i += kThreads) {
      uint32_t bits = 0;
      LK_NO_UNROLL
      for (int group = 0; group < 32 / kDropoutGroup; ++group) {
        const int column = column0 + i % kWords * 32 + group * kDropoutGroup;
        const PhiloxWords words = mask.words(row_of(i / kWords), column);
        LK_UNROLL
        for (int j = 0; j < kDropoutGroup; ++j) {
          bits |= (dropout_bits(words, j) >= mask.threshold ? 1u : 0u) << (group * kDropoutGroup + j);
        }
      }
      store_shared_4(smem + i * 4, bits);
    }
  }
};

}  // namespace lk
