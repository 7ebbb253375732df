// Where things lie: tiles in shared memory and fragments in registers. Host and device, no machine access.
#pragma once

#include <cstdint>

#include "config.h"
#include "device.h"

namespace lk {

LK_HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }
LK_HOST_DEVICE constexpr int larger(int a, int b) { return a > b ? a : b; }
LK_HOST_DEVICE constexpr int smaller(int a, int b) { return a < b ? a : b; }

constexpr int kWarp = 32;

// A [rows, columns] tile of 16-bit elements in shared memory. Chunks are permuted within their row, so that the eight
// rows that ldmatrix reads together (and, transposed, eight rows of one chunk column) lie in different banks.
template <int kColumns>
struct SharedTile {
  static_assert(kColumns == 16 || kColumns == 32 || kColumns == 64 || kColumns == 128, "a row is 32 to 256 bytes");
  static constexpr int kRowBytes = kColumns * 2;
  static constexpr int kChunks = kRowBytes / kChunkBytes;

  static constexpr int bytes(int rows) { return rows * kRowBytes; }

  // Byte offset of a chunk.
  LK_HOST_DEVICE static uint32_t offset(int row, int chunk) {
    // Four rows of 32 bytes or two of 64 share the 128 bytes of all banks; a longer row has them to itself.
    const int turn = kColumns == 16 ? (row >> 2) & 1 : kColumns == 32 ? (row >> 1) & 3 : row & 7;
    return static_cast<uint32_t>(row * kRowBytes + ((chunk ^ turn) * kChunkBytes));
  }
};

// How an operand of P Qᵀ, P [m, depth] and Q [n, depth], lies in memory and in its tile.
enum class Layout {
  kRows,     // row by row, the depth contiguous
  kColumns,  // its transpose, row by row: m or n contiguous. ldmatrix turns the fragments back.
};

// Which row and chunk of 8x8 matrices lane `lane` names when one load_matrix_x4 fetches fragments of mma.m16n8k16.
// P: one fragment of 16 rows, 16 deep. Q: two fragments of 8 rows, 16 deep; r[0..1] is the first, r[2..3] the second.
// In the other layout rows and depth change places, and with them the two patterns.
struct RowsFirst {
  LK_HOST_DEVICE static int row(int lane) { return lane % 16; }
  LK_HOST_DEVICE static int chunk(int lane) { return lane / 16; }
};
struct ChunksFirst {
  LK_HOST_DEVICE static int row(int lane) { return lane % 8 + lane / 16 * 8; }
  LK_HOST_DEVICE static int chunk(int lane) { return lane / 8 % 2; }
};

// Accumulator: d[0..1] are neighbours in row(lane), d[2..3] the same columns eight rows below.
struct FragmentC {
  LK_HOST_DEVICE static int row(int lane) { return lane / 4; }
  LK_HOST_DEVICE static int column(int lane) { return lane % 4 * 2; }
};

}  // namespace lk
