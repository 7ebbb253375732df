// How the threads of a block go through an operand, a tile of it at a time: where a thread's next chunk is in memory.
#pragma once

#include "../tile.h"

namespace lk {

// One of the two factors: [rows, depth], or in Layout::kColumns [depth, rows]. `stride` lies between the rows of
// memory.
struct Operand {
  const void* data;
  int64_t stride;
  int32_t rows, depth;
  const int32_t* order = nullptr;  // of the rows of memory, for chunks that ask for it (InOrder)
};

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
    valid_ = m.rows - (row0 + grid.column);
    // Aligned, a row of memory ends with a whole chunk; past it, that chunk once more.
    column_ = !kAligned || valid_ > 0 ? row0 + grid.column : m.rows - Grid::Tile::kChunkElements;
    begin(grid, m, k0, element_bytes);
  }

  // At depth k0 of an operand, which may be another one than before, with the same columns of it.
  LK_DEVICE void begin(const Grid& grid, const Operand& m, int k0, int element_bytes) {
    left_ = m.depth - k0 - grid.row;
    source_ = place_in(m, k0 + grid.row, column_, element_bytes);
    step_ = (Grid::kSteps == 1 ? kDepth : Grid::kRowStep) * m.stride * element_bytes;
  }

  LK_DEVICE const unsigned char* source(int) const { return source_; }
  LK_DEVICE bool inside(int step) const { return step * Grid::kRowStep < left_; }
  LK_DEVICE int elements() const { return kAligned ? Grid::Tile::kChunkElements : valid_; }
  LK_DEVICE void next_step() { source_ += step_; }
  LK_DEVICE void next_tile(int) { left_ -= kDepth; }

 private:
  const unsigned char* source_;
  int left_;            // of the depth, from this thread's first chunk on
  int column_, valid_;  // of the first element of a chunk; elements of it
  int64_t step_;        // bytes between the chunks of this thread
};

// RowWalk through the depth of one operand after the other, with the same rows of each: what is the same in all is
// kept.
template <class Grid, int kDepth, bool kAligned>
class PartsRowWalk {
  static_assert(kAligned);

 public:
  LK_DEVICE PartsRowWalk(const Grid& grid, const Operand& m, int row0, int k0, int element_bytes) {
    const int rows = m.rows - row0;
    const int first = grid.row < rows ? grid.row : grid.row % rows;  // past the end: as RowWalk
    row_ = row0 + first;
    LK_UNROLL
    for (int i = 1; i < Grid::kSteps; ++i) {
      const int row = grid.row + i * Grid::kRowStep;
      beyond_[i - 1] = row < rows ? row - first : 0;
    }
    begin(grid, m, k0, element_bytes);
  }

  LK_DEVICE void begin(const Grid& grid, const Operand& m, int k0, int element_bytes) {
    left_ = m.depth - k0 - grid.column;
    stride_ = static_cast<uint32_t>(m.stride * element_bytes);
    source_ = place_in(m, row_, k0 + grid.column, element_bytes);
  }

  LK_DEVICE const unsigned char* source(int step) const {
    return step == 0 ? source_ : source_ + static_cast<uint64_t>(beyond_[step - 1]) * stride_;
  }
  LK_DEVICE bool inside(int) const { return 0 < left_; }
  LK_DEVICE int elements() const { return Grid::Tile::kChunkElements; }
  LK_DEVICE void next_step() {}
  LK_DEVICE void next_tile(int element_bytes) {
    source_ += kDepth * element_bytes;
    left_ -= kDepth;
  }

 private:
  const unsigned char* source_;
  uint32_t stride_;                               // bytes, of a row less than 4 GiB long
  uint32_t beyond_[larger(Grid::kSteps - 1, 1)];  // rows from there to the thread's others
  int row_, left_;
};

// Through rows in an order of their own, in Layout::kRows.
template <class Grid, int kDepth, bool kAligned>
class OrderedRowWalk {
 public:
  LK_DEVICE OrderedRowWalk(const Grid& grid, const Operand& m, int row0, int k0, int element_bytes) {
    left_ = m.depth - k0 - grid.column;
    const int rows = m.rows - row0;
    LK_UNROLL
    for (int i = 0; i < Grid::kSteps; ++i) {
      const int row = (grid.row + i * Grid::kRowStep) % smaller(rows, Grid::kTileRows);  // past the end: as RowWalk
      source_[i] = place_in(m, load_global(m.order + row0 + row), k0 + grid.column, element_bytes);
    }
  }

  LK_DEVICE const unsigned char* source(int step) const { return source_[step]; }
  LK_DEVICE bool inside(int) const { return 0 < left_; }
  LK_DEVICE int elements() const { return kAligned ? Grid::Tile::kChunkElements : left_; }
  LK_DEVICE void next_step() {}
  LK_DEVICE void next_tile(int element_bytes) {
    LK_UNROLL
    for (const unsigned char*& source : source_) source += kDepth * element_bytes;
    left_ -= kDepth;
  }

 private:
  const unsigned char* source_[Grid::kSteps];
  int left_;
};

// The same in Layout::kColumns: the rows of a tile are looked up while the one in front of it is copied.
template <class Grid, int kDepth, bool kAligned>
class OrderedColumnWalk {
 public:
  LK_DEVICE OrderedColumnWalk(const Grid& grid, const Operand& m, int row0, int k0, int element_bytes)
      : order_(m.order + k0 + grid.row), stride_(m.stride * element_bytes) {
    const int column = row0 + grid.column;
    valid_ = m.rows - column;
    left_ = m.depth - k0 - grid.row;
    first_ = static_cast<const unsigned char*>(m.data) +
             (!kAligned || valid_ > 0 ? column : m.rows - Grid::Tile::kChunkElements) * element_bytes;
    look_up();
  }

  LK_DEVICE const unsigned char* source(int step) const { return first_ + row_[step] * stride_; }
  LK_DEVICE bool inside(int step) const { return step * Grid::kRowStep < left_; }
  LK_DEVICE int elements() const { return kAligned ? Grid::Tile::kChunkElements : valid_; }
  LK_DEVICE void next_step() {}
  LK_DEVICE void next_tile(int) {
    left_ -= kDepth;
    order_ += kDepth;
    look_up();
  }

 private:
  LK_DEVICE void look_up() {
    LK_UNROLL
    for (int i = 0; i < Grid::kSteps; ++i) row_[i] = inside(i) ? load_global(order_ + i * Grid::kRowStep) : 0;
  }

  const int32_t* order_;  // of this thread's first chunk
  const int64_t stride_;  // bytes
  const unsigned char* first_;
  int left_, valid_;
  int32_t row_[Grid::kSteps];
};

}  // namespace lk
