// The operands of a product on their way: from memory to a tile in shared memory, and from there to fragments.
//
// A loader is a *walk*, which knows where this thread's next chunk is and how much of it exists (walks.cuh), and a
// *chunk*, which knows how one gets into shared memory.
#pragma once

#include <type_traits>

#include "walks.cuh"

namespace lk {

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

// 16 bytes at a multiple of 16 bytes, of which those behind the depth are zero: what rows go on with is not used.
template <class Element>
struct EndingChunk {
  static constexpr bool kAligned = false;

  LK_DEVICE static constexpr int element_bytes() { return sizeof(typename Element::Storage); }
  LK_DEVICE static void load(uint32_t smem, const unsigned char* source, bool inside, int elements) {
    copy_async_16(smem, source, inside ? smaller(larger(elements, 0) * element_bytes(), kChunkBytes) : 0);
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

// Any of these, of an operand whose row i in memory is row order[i] of a matrix.
template <class Chunk>
struct InOrder : Chunk {};
template <class>
constexpr bool kIsInOrder = false;
template <class Chunk>
constexpr bool kIsInOrder<InOrder<Chunk>> = true;

// Any of these, of an operand that is not the last: the loader goes on in another.
template <class Chunk>
struct InParts : Chunk {};
template <class>
constexpr bool kIsInParts = false;
template <class Chunk>
constexpr bool kIsInParts<InParts<Chunk>> = true;

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

// ------------------------------------------------------------------------------------------------------- loader

// Brings rows [row0, row0 + kRows) of an operand into shared memory, kDepth of the depth at a time. What lies past the
// depth is zero, in both operands, because NaN · 0 is NaN; the products of rows past the end nobody stores.
template <class Element, int kRows, int kDepth, Layout kLayout, int kThreads, class Chunk>
class TileLoader {
  static constexpr bool kTransposed = kLayout == Layout::kColumns;
  using Tile = SharedTile<kTransposed ? kRows : kDepth, sizeof(typename Element::Storage)>;
  using Grid = ChunkGrid<Tile, kTransposed ? kDepth : kRows, kThreads>;
  using PlainWalk = std::conditional_t<kTransposed, ColumnWalk<Grid, kDepth, Chunk::kAligned>,
                                       RowWalk<Grid, kDepth, Chunk::kAligned>>;
  using OrderedWalk = std::conditional_t<kTransposed, OrderedColumnWalk<Grid, kDepth, Chunk::kAligned>,
                                         OrderedRowWalk<Grid, kDepth, Chunk::kAligned>>;
  using PartsWalk = std::conditional_t<kTransposed, ColumnWalk<Grid, kDepth, Chunk::kAligned>,
                                       PartsRowWalk<Grid, kDepth, Chunk::kAligned>>;
  using Walk =
      std::conditional_t<kIsInOrder<Chunk>, OrderedWalk, std::conditional_t<kIsInParts<Chunk>, PartsWalk, PlainWalk>>;

 public:
  LK_DEVICE TileLoader(const Operand& m, int row0, int k0, Chunk chunk = {}) : TileLoader(Grid(), m, row0, k0, chunk) {}

  // Goes on with another operand, of which it loads the same rows.
  LK_DEVICE void begin(const Operand& m) { walk_.begin(Grid(), m, 0, chunk_.element_bytes()); }

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
