// Where things lie: tiles in shared memory and fragments in registers. Host and device, no machine access.
#pragma once

#include <cstdint>

#include "config/tiles.h"
#include "device.h"

namespace lk {

LK_HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }
LK_HOST_DEVICE constexpr int larger(int a, int b) { return a > b ? a : b; }
LK_HOST_DEVICE constexpr int smaller(int a, int b) { return a < b ? a : b; }

constexpr int kWarp = 32;

// A [rows, columns] tile of 16- or 32-bit elements in shared memory. Chunks are permuted within their row, so that the
// eight rows that ldmatrix reads together (and, transposed, eight rows of one chunk column) lie in different banks.
// With 32-bit elements so do the four rows, two chunks wide, that a warp reads word by word for a transposed fragment.
template <int kColumns, int kElementBytes>
struct SharedTile {
  static_assert(kElementBytes == 2 || kElementBytes == 4);
  static_assert(kColumns == 16 || kColumns == 32 || kColumns == 64 || kColumns == 128, "a power of two of chunks");
  static constexpr int kRowBytes = kColumns * kElementBytes;
  static constexpr int kChunks = kRowBytes / kChunkBytes, kChunkElements = chunk_elements(kElementBytes);

  // Fragments' addresses differ by an exclusive or with chunks of a row (OperandTile::load).
  static_assert(kDynamicSharedAlignment % kRowBytes == 0);

  static constexpr int bytes(int rows) { return rows * kRowBytes; }

  // What is exclusive-or'ed to the number of a chunk. A sum of rows without a carry has the exclusive or of their
  // swizzles.
  LK_HOST_DEVICE static constexpr int swizzle(int row) {
    // Four rows of 32 bytes or two of 64 share the 128 bytes of all banks; a longer row has them to itself.
    if (kRowBytes == 32) return (row >> 2) & 1;
    if (kElementBytes == 2) return kRowBytes == 64 ? (row >> 1) & 3 : row & 7;
    return (row >> 2 & 1) | (kRowBytes == 64 ? row & 2 : (row & 3) << 1);
  }

  // Byte offset of a chunk, and of an element.
  LK_HOST_DEVICE static uint32_t offset(int row, int chunk) {
    return static_cast<uint32_t>(row * kRowBytes + ((chunk ^ swizzle(row)) * kChunkBytes));
  }
  LK_HOST_DEVICE static uint32_t element_offset(int row, int column) {
    return offset(row, column / kChunkElements) + static_cast<uint32_t>(column % kChunkElements * kElementBytes);
  }
};

// How an operand of P Qᵀ, P [m, depth] and Q [n, depth], lies in memory and in its tile.
enum class Layout {
  kRows,     // row by row, the depth contiguous
  kColumns,  // its transpose, row by row: m or n contiguous. The fragments are turned back when they are loaded.
};

// Which row and chunk of 8x8 matrices lane `lane` names when one load_matrix_x4 fetches fragments. They are two chunks
// deep: 16 elements of 16 bits (mma.m16n8k16) or 8 of 32 (mma.m16n8k8).
// P: one fragment of 16 rows. Q: two fragments of 8 rows; r[0..1] is the first, r[2..3] the second.
// In the other layout rows and depth change places, and with them the two patterns.
struct RowsFirst {
  LK_HOST_DEVICE static constexpr int row(int lane) { return lane % 16; }
  LK_HOST_DEVICE static constexpr int chunk(int lane) { return lane / 16; }
};
struct ChunksFirst {
  LK_HOST_DEVICE static constexpr int row(int lane) { return lane % 8 + lane / 16 * 8; }
  LK_HOST_DEVICE static constexpr int chunk(int lane) { return lane / 8 % 2; }
};

// Accumulator: d[0..1] are neighbours in row(lane), d[2..3] the same columns eight rows below.
struct FragmentC {
  LK_HOST_DEVICE static int row(int lane) { return lane / 4; }
  LK_HOST_DEVICE static int column(int lane) { return lane % 4 * 2; }
};

}  // namespace lk
