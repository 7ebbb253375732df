// The operands of a product on their way: from memory to a tile in shared memory, and from there to fragments.
//
// A loader is a *walk*, which knows where this thread's next chunk is and how much of it exists, and a *chunk*, which
// knows how one gets into shared memory.
#pragma once

#include <type_traits>

#include "../tile.h"

namespace lk {

// One of the two factors: [rows, depth], or in Layout::kColumns [depth, rows]. `stride` lies between the rows of
// memory.
struct Operand {
  const void* data;
  int64_t stride;
  int32_t rows, depth;
};

// A tile of an operand, kRows x kDepth, in shared memory. `Lanes` says how a fragment is spread over the lanes.
template <class Element, int kRows, int kDepth, Layout kLayout, class Lanes>
struct OperandTile {
  static constexpr bool kTransposed = kLayout == Layout::kColumns;
  using Tile = SharedTile<kTransposed ? kRows : kDepth, sizeof(typename Element::Storage)>;
  static constexpr int kBytes = Tile::bytes(kTransposed ? kDepth : kRows);
  static constexpr int kFragmentDepth = 2 * Tile::kChunkElements;

  // Where this lane reads for the fragments from `row` on.
  LK_DEVICE static uint32_t lane_offset(int row) {
    const int lane = thread_index() % kWarp;
    if constexpr (!kTransposed) return Tile::offset(row + Lanes::row(lane), Lanes::chunk(lane));
    if constexpr (kWide) return Tile::element_offset(lane % 4, row + lane / 4);
    return Tile::offset(Lanes::row(lane), row / Tile::kChunkElements + Lanes::chunk(lane));
  }

  // Rows [16 i, 16 i + 16) from there, fragment `step` of the depth. Eight rows of memory on, the swizzle of a row is
  // the same; two chunks on, the address differs by an exclusive or.
  LK_DEVICE static void load(uint32_t (&fragment)[4], uint32_t lane_address, int i, int step) {
    if constexpr (!kTransposed) {
      load_matrix_x4(fragment, (lane_address ^ (step * 2 * kChunkBytes)) + i * 16 * Tile::kRowBytes);
    } else if constexpr (!kWide) {
      load_matrix_x4_transposed(fragment, (lane_address ^ (i * 2 * kChunkBytes)) + step * 16 * Tile::kRowBytes);
    } else {
      // ldmatrix transposes 16-bit elements only. Lane 4g + t has row g, four deep at t.
      LK_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int deep = Lanes::row(8 * j) / 8 * 4, eight_rows = Lanes::chunk(8 * j);
        const uint32_t chunks = static_cast<uint32_t>((i * 2 + eight_rows) * 2 ^ Tile::swizzle(deep));
        fragment[j] =
            load_shared_4((lane_address ^ (chunks * kChunkBytes)) + (step * kFragmentDepth + deep) * Tile::kRowBytes);
      }
    }
    if constexpr (kWide) {
      LK_UNROLL
      for (int j = 0; j < 4; ++j) fragment[j] = Element::round(fragment[j]);
    }
  }

 private:
  static constexpr bool kWide = sizeof(typename Element::Storage) == 4;
};

// ------------------------------------------------------------------------------------------------------- chunks

// 16 bytes at a multiple of 16 bytes, copied asynchronously.
template <class Element>
struct AsyncChunk {
  static constexpr bool kAligned = true;

  LK_DEVICE static constexpr int element_bytes() { return sizeof(typename Element::Storage); }
  // Where the chunk is inside of the operand, its first `elements` exist (aligned: all); the others become zero.
  LK_DEVICE static void load(uint32_t smem, const unsigned char* source, bool inside, int) {
    copy_async_16(smem, source, inside ? kChunkBytes : 0);
  }
};

// The same in halves, where rows of a Layout::kRows operand begin and end between those of chunks.
template <class Element>
struct HalvesChunk {
  static constexpr bool kAligned = false;
  static constexpr int kHalf = kChunkBytes / 2;

  LK_DEVICE static constexpr int element_bytes() { return sizeof(typename Element::Storage); }
  LK_DEVICE static bool fits(const Operand& m) {
    const int64_t stride = m.stride * element_bytes(), length = m.depth * element_bytes();
    return reinterpret_cast<uintptr_t>(m.data) % kHalf == 0 && stride % kHalf == 0 && length % kHalf == 0;
  }
  LK_DEVICE static void load(uint32_t smem, const unsigned char* source, bool inside, int elements) {
    const int valid = inside ? elements : 0;
    copy_async_8(smem, source, valid > 0 ? kHalf : 0);
    copy_async_8(smem + kHalf, source + kHalf, valid > kHalf / element_bytes() ? kHalf : 0);
  }
};

// At any address, element by element.
template <class Element>
struct GatheredChunk {
  using Storage = typename Element::Storage;
  static constexpr bool kAligned = false;

  LK_DEVICE static constexpr int element_bytes() { return sizeof(Storage); }
  LK_DEVICE static void load(uint32_t smem, const unsigned char* source, bool inside, int elements) {
    constexpr int kPerWord = 4 / sizeof(Storage);
    const int valid = inside ? elements : 0;
    Vec16 v = {};
    LK_UNROLL
    for (int j = 0; j < chunk_elements(sizeof(Storage)); ++j) {
      const uint32_t bits = j < valid ? load_global(reinterpret_cast<const Storage*>(source) + j) : 0u;
      v.word[j / kPerWord] |= bits << (16 * (j % kPerWord));
    }
    store_shared_16(smem, v);
  }
};

// In another format, decoded on the way (formats/).
template <class Format, bool kAligned_>
struct DecodedChunk {
  static constexpr bool kAligned = kAligned_;

  LK_DEVICE static constexpr int element_bytes() { return Format::kElementBytes; }
  LK_DEVICE static void load(uint32_t smem, const unsigned char* source, bool inside, int elements) {
    store_shared_16(smem, Format::template decode<kAligned>(source, inside ? elements : 0));
  }
};

// One of two, as a launch is told.
template <class First, class Second>
struct EitherChunk {
  static constexpr bool kAligned = First::kAligned;
  static_assert(Second::kAligned == kAligned);
  bool is_first;

  LK_DEVICE int element_bytes() const { return is_first ? First::element_bytes() : Second::element_bytes(); }
  LK_DEVICE void load(uint32_t smem, const unsigned char* source, bool inside, int elements) const {
    if (is_first) {
      First::load(smem, source, inside, elements);
    } else {
      Second::load(smem, source, inside, elements);
    }
  }
};

// Elements as they are multiplied.
template <class Element, bool kAligned>
using PlainChunk = std::conditional_t<kAligned, AsyncChunk<Element>, GatheredChunk<Element>>;

// Whether a kernel of this access reads an operand in chunks: x and w; s; and of the adapter a, whose rows are long
// where factors lie in rows, and b, whose rows then have `rank` elements. In columns it is the other way round.
constexpr bool is_base_whole(Access access) { return access != Access::kGatherAll; }
constexpr bool is_s_whole(Access access) { return access == Access::kWhole; }
constexpr bool is_a_whole(Access access, Layout factors) {
  return factors == Layout::kRows ? is_base_whole(access) : is_s_whole(access);
}
constexpr bool is_b_whole(Access access, Layout factors) {
  return factors == Layout::kRows ? is_s_whole(access) : is_base_whole(access);
}

// -------------------------------------------------------------------------------------------------------- walks

// How the threads of a block share out the chunks of a tile. A thread's chunks lie in one column of chunks, kRowStep
// rows of the tile apart.
template <class Tile_, int kTileRows_, int kThreads>
struct ChunkGrid {
  using Tile = Tile_;
  static constexpr int kTileRows = kTileRows_, kRowStep = kThreads / Tile::kChunks;
  static constexpr int kSteps = (kTileRows + kRowStep - 1) / kRowStep;
  static_assert(kThreads % Tile::kChunks == 0 && (kRowStep & (kRowStep - 1)) == 0,
                "sums of a row and steps do not carry");

  // This thread's first chunk, in elements, and its place in the tile.
  const int row = thread_index() / Tile::kChunks, column = thread_index() % Tile::kChunks * Tile::kChunkElements;
  const uint32_t first_target = Tile::offset(row, thread_index() % Tile::kChunks);

  LK_DEVICE static uint32_t target(uint32_t smem, uint32_t first, int step) {
    const uint32_t swizzle = static_cast<uint32_t>(Tile::swizzle(step * kRowStep)) * kChunkBytes;
    return smem + (first ^ swizzle) + step * kRowStep * Tile::kRowBytes;
  }
  // Whether the tile has a row there.
  LK_DEVICE static bool has(int step) {
    return kTileRows % kRowStep == 0 || thread_index() / Tile::kChunks + step * kRowStep < kTileRows;
  }
};

LK_DEVICE const unsigned char* place_in(const Operand& m, int row, int column, int element_bytes) {
  return static_cast<const unsigned char*>(m.data) + (row * m.stride + column) * element_bytes;
}

// Through rows [row0, row0 + kRows) of an operand in Layout::kRows, kDepth of the depth at a time.
template <class Grid, int kDepth, bool kAligned>
class RowWalk {
 public:
  LK_DEVICE RowWalk(const Grid& grid, const Operand& m, int row0, int k0, int element_bytes) {
    left_ = m.depth - k0 - grid.column;
    // Rows past the end are others of the tile once more, whose products nobody stores: not all the last one, which a
    // tile with few rows would fetch from one place of the cache as often as it has rows.
    const int rows = m.rows - row0;
    const int first = grid.row < rows ? grid.row : grid.row % rows;
    source_ = place_in(m, row0 + first, k0 + grid.column, element_bytes);
    LK_UNROLL
    for (int i = 1; i < Grid::kSteps; ++i) {
      const int row = grid.row + i * Grid::kRowStep;
      const int64_t beyond = row < rows ? row - first : 0;
      // Never negative: rows past the end begin again at this thread's first. Known to fit in 32 bits as a count of
      // chunks, an offset takes one register of the main loop, not two.
      if constexpr (kAligned) {
        constexpr uint64_t kUnit = kChunkBytes;
        offset_[i - 1] =
            static_cast<uint32_t>(static_cast<uint64_t>(beyond * m.stride * element_bytes) / kUnit) * kUnit;
      } else {
        offset_[i - 1] = static_cast<uint64_t>(beyond * m.stride * element_bytes);
      }
    }
  }

  LK_DEVICE const unsigned char* source(int step) const { return step == 0 ? source_ : source_ + offset_[step - 1]; }
  LK_DEVICE bool inside(int) const { return 0 < left_; }
  LK_DEVICE int elements() const { return kAligned ? Grid::Tile::kChunkElements : left_; }
  LK_DEVICE void next_step() {}
  LK_DEVICE void next_tile(int element_bytes) {
    source_ += kDepth * element_bytes;
    left_ -= kDepth;
  }

 private:
  const unsigned char* source_;
  uint64_t offset_[larger(Grid::kSteps - 1, 1)];  // bytes from there to the thread's other rows
  int left_;                                      // of the depth, from this thread's chunk on
};

// The same in Layout::kColumns: a row of memory is one of the depth.
template <class Grid, int kDepth, bool kAligned>
class ColumnWalk {
 public:
  LK_DEVICE ColumnWalk(const Grid& grid, const Operand& m, int row0, int k0, int element_bytes) {
    static_assert(Grid::kTileRows % Grid::kRowStep == 0 || Grid::kSteps == 1, "steps lead from one tile to the next");
    const int column = row0 + grid.column;
    valid_ = m.rows - column;
    left_ = m.depth - k0 - grid.row;
    // Aligned, a row of memory ends with a whole chunk; past it, that chunk once more.
    source_ = place_in(m, k0 + grid.row, !kAligned || valid_ > 0 ? column : m.rows - Grid::Tile::kChunkElements,
                       element_bytes);
    step_ = (Grid::kSteps == 1 ? kDepth : Grid::kRowStep) * m.stride * element_bytes;
  }

  LK_DEVICE const unsigned char* source(int) const { return source_; }
  LK_DEVICE bool inside(int step) const { return step * Grid::kRowStep < left_; }
  LK_DEVICE int elements() const { return kAligned ? Grid::Tile::kChunkElements : valid_; }
  LK_DEVICE void next_step() { source_ += step_; }
  LK_DEVICE void next_tile(int) { left_ -= kDepth; }

 private:
  const unsigned char* source_;
  int left_;      // of the depth, from this thread's first chunk on
  int valid_;     // elements of a chunk
  int64_t step_;  // bytes between the chunks of this thread
};

// ------------------------------------------------------------------------------------------------------- loader

// Brings rows [row0, row0 + kRows) of an operand into shared memory, kDepth of the depth at a time. What lies past the
// depth is zero, in both operands, because NaN · 0 is NaN; the products of rows past the end nobody stores.
template <class Element, int kRows, int kDepth, Layout kLayout, int kThreads, class Chunk>
class TileLoader {
  static constexpr bool kTransposed = kLayout == Layout::kColumns;
  using Tile = SharedTile<kTransposed ? kRows : kDepth, sizeof(typename Element::Storage)>;
  using Grid = ChunkGrid<Tile, kTransposed ? kDepth : kRows, kThreads>;
  using Walk = std::conditional_t<kTransposed, ColumnWalk<Grid, kDepth, Chunk::kAligned>,
                                  RowWalk<Grid, kDepth, Chunk::kAligned>>;

 public:
  LK_DEVICE TileLoader(const Operand& m, int row0, int k0, Chunk chunk = {}) : TileLoader(Grid(), m, row0, k0, chunk) {}

  // The next kDepth of the depth.
  LK_DEVICE void load(uint32_t smem) {
    LK_UNROLL
    for (int step = 0; step < Grid::kSteps; ++step) {
      if (!Grid::has(step)) break;
      const unsigned char* const source = walk_.source(step);
      const bool inside = walk_.inside(step);
      chunk_.load(Grid::target(smem, target_, step), source, inside, walk_.elements());
      walk_.next_step();
    }
    walk_.next_tile(chunk_.element_bytes());
  }

 private:
  LK_DEVICE TileLoader(const Grid& grid, const Operand& m, int row0, int k0, Chunk chunk)
      : chunk_(chunk), target_(grid.first_target), walk_(grid, m, row0, k0, chunk_.element_bytes()) {}

  Chunk chunk_;
  uint32_t target_;
  Walk walk_;
};

}  // namespace lk
