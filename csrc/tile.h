// Where things lie: tiles in shared memory and fragments in registers. Host and device, no machine access.
#pragma once

#include <cstdint>

#include "config.h"
#include "device.h"

namespace lk {

constexpr int kWarp = 32;

// A [rows, columns] tile of 16-bit elements in shared memory. Chunks are permuted within their row, so that the eight
// rows that ldmatrix reads together (and, transposed, eight rows of one chunk column) lie in different banks.
template <int kColumns>
struct SharedTile {
  static_assert(kColumns == 32 || kColumns == 64 || kColumns == 128, "a row is 64, 128 or 256 bytes");
  static constexpr int kRowBytes = kColumns * 2;
  static constexpr int kChunks = kRowBytes / kChunkBytes;

  static constexpr int bytes(int rows) { return rows * kRowBytes; }

  // Byte offset of a chunk.
  LK_HOST_DEVICE static uint32_t offset(int row, int chunk) {
    // Two rows of 64 bytes share the 128 bytes of all banks; a longer row has them to itself.
    const int turn = kColumns == 32 ? (row >> 1) & 3 : row & 7;
    return static_cast<uint32_t>(row * kRowBytes + ((chunk ^ turn) * kChunkBytes));
  }
};

// Which row and chunk lane `lane` names when one load_matrix_x4 fetches a fragment of mma.m16n8k16.

// A operand: 16 rows, 16 columns.
struct FragmentA {
  LK_HOST_DEVICE static int row(int lane) { return lane % 16; }
  LK_HOST_DEVICE static int chunk(int lane) { return lane / 16; }
};

// B operand, stored [n, k]: two fragments of 8 columns n, 16 deep; r[0..1] is the first, r[2..3] the second.
struct FragmentB {
  LK_HOST_DEVICE static int row(int lane) { return lane % 8 + lane / 16 * 8; }
  LK_HOST_DEVICE static int chunk(int lane) { return lane / 8 % 2; }
};

// Accumulator: d[0..1] are neighbours in row(lane), d[2..3] the same columns eight rows below.
struct FragmentC {
  LK_HOST_DEVICE static int row(int lane) { return lane / 4; }
  LK_HOST_DEVICE static int column(int lane) { return lane % 4 * 2; }
};

}  // namespace lk
