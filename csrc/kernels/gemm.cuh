// The main loop that all LoRA kernels share: acc += P Qᵀ for a [kM, kN] tile, operands streamed through shared memory.
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
  bool is_float = false;  // elements are fp32 that the kernel rounds to its 16-bit type (TileLoader)
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

  // Rows [16 i, 16 i + 16) from there, fragment `step` of the depth. Eight rows of memory on, the turn of a row is the
  // same; two chunks on, the address differs by an exclusive or.
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
        const uint32_t chunks = static_cast<uint32_t>((i * 2 + eight_rows) * 2 ^ Tile::turn(deep));
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

// Brings rows [row0, row0 + kRows) of an operand into shared memory, kDepth of the depth at a time. What lies past the
// depth is zero, in both operands, because NaN · 0 is NaN; the products of rows past the end nobody stores. Where
// `Rounded` is an element type, the operand may be fp32 and is rounded to that type on the way.
template <class Element, int kRows, int kDepth, Layout kLayout, int kThreads, bool kAligned, class Rounded = void>
class TileLoader {
  using Storage = typename Element::Storage;
  static constexpr bool kTransposed = kLayout == Layout::kColumns, kMayBeFloat = !std::is_void_v<Rounded>;
  static_assert(!kMayBeFloat || sizeof(Storage) == 2, "what is as wide as fp32 is not rounded here");
  using Tile = SharedTile<kTransposed ? kRows : kDepth, sizeof(Storage)>;
  static constexpr int kChunkElements = Tile::kChunkElements;
  static constexpr int kTileRows = kTransposed ? kDepth : kRows;
  // A thread's chunks lie in one column of chunks, so many rows of the tile apart.
  static constexpr int kRowStep = kThreads / Tile::kChunks;
  static constexpr int kSteps = (kTileRows + kRowStep - 1) / kRowStep;
  static_assert(kThreads % Tile::kChunks == 0 && (kRowStep & (kRowStep - 1)) == 0,
                "sums of a row and steps do not carry");

 public:
  LK_DEVICE TileLoader(const Operand& m, int row0, int k0) : is_float_(m.is_float) {
    const int row = thread_index() / Tile::kChunks, column = thread_index() % Tile::kChunks * kChunkElements;
    target_ = Tile::offset(row, thread_index() % Tile::kChunks);
    if constexpr (kTransposed) {
      static_assert(kTileRows % kRowStep == 0 || kSteps == 1, "steps lead from one tile to the next");
      const int column_gmem = row0 + column;
      valid_ = m.rows - column_gmem;
      left_ = m.depth - k0 - row;
      // Aligned, a row of memory ends with a whole chunk; past it, that chunk once more.
      source_ = place(m, k0 + row, !kAligned || valid_ > 0 ? column_gmem : m.rows - kChunkElements);
      step_ = (kSteps == 1 ? kDepth : kRowStep) * m.stride * element_size();
    } else {
      left_ = m.depth - k0 - column;
      const int last = m.rows - 1, first = smaller(row0 + row, last);
      source_ = place(m, first, k0 + column);
      LK_UNROLL
      for (int i = 1; i < kSteps; ++i) {
        // Known to fit in 32 bits as a count of units, an offset takes one register of the main loop, not two.
        constexpr uint64_t kUnit = kAligned ? kChunkBytes : sizeof(Storage);
        const int64_t rows = smaller(row0 + row + i * kRowStep, last) - first;
        offset_[i - 1] = static_cast<uint32_t>(static_cast<uint64_t>(rows * m.stride * element_size()) / kUnit) * kUnit;
      }
    }
  }

  // The next kDepth of the depth.
  LK_DEVICE void load(uint32_t smem) {
    LK_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      if (kTileRows % kRowStep != 0 && thread_index() / Tile::kChunks + i * kRowStep >= kTileRows) break;
      const unsigned char* const source = kTransposed || i == 0 ? source_ : source_ + offset_[i - 1];
      const bool inside = kTransposed ? i * kRowStep < left_ : 0 < left_;
      const uint32_t turn = static_cast<uint32_t>(Tile::turn(i * kRowStep)) * kChunkBytes;
      const uint32_t address = smem + (target_ ^ turn) + i * kRowStep * Tile::kRowBytes;
      if (kMayBeFloat && is_float_) {
        if constexpr (kMayBeFloat) store_shared_16(address, round(source, valid(inside)));
      } else if constexpr (kAligned) {
        copy_async_16(address, source, inside ? kChunkBytes : 0);  // a chunk is inside as a whole or not at all
      } else {
        store_shared_16(address, gather(source, valid(inside)));
      }
      if (kTransposed) source_ += step_;
    }
    if (!kTransposed) source_ += kDepth * element_size();
    left_ -= kDepth;
  }

 private:
  LK_DEVICE int element_size() const { return kMayBeFloat && is_float_ ? 4 : sizeof(Storage); }

  LK_DEVICE const unsigned char* place(const Operand& m, int row, int column) const {
    return static_cast<const unsigned char*>(m.data) + (row * m.stride + column) * element_size();
  }

  // How many elements of a chunk exist; with kAligned, a whole chunk or none.
  LK_DEVICE int valid(bool inside) const {
    if (!inside) return 0;
    return kAligned ? kChunkElements : kTransposed ? valid_ : left_;
  }

  // A chunk at any address, element by element; zero from element `valid` on.
  LK_DEVICE static Vec16 gather(const unsigned char* source, int valid) {
    constexpr int kPerWord = 4 / sizeof(Storage);
    Vec16 v = {};
    LK_UNROLL
    for (int j = 0; j < kChunkElements; ++j) {
      const uint32_t bits = j < valid ? load_global(reinterpret_cast<const Storage*>(source) + j) : 0u;
      v.word[j / kPerWord] |= bits << (16 * (j % kPerWord));
    }
    return v;
  }

  // The same from fp32.
  LK_DEVICE static Vec16 round(const unsigned char* source, int valid) {
    float f[kChunkElements];
    if (kAligned && valid > 0) {
      LK_UNROLL
      for (int half = 0; half < 2; ++half) {
        const Vec16 v = load_global(reinterpret_cast<const Vec16*>(source) + half);
        LK_UNROLL
        for (int j = 0; j < 4; ++j) f[half * 4 + j] = float_of(v.word[j]);
      }
    } else {
      LK_UNROLL
      for (int j = 0; j < kChunkElements; ++j) {
        f[j] = j < valid ? load_global(reinterpret_cast<const float*>(source) + j) : 0.0f;
      }
    }
    return {
        {Rounded::pack(f[0], f[1]), Rounded::pack(f[2], f[3]), Rounded::pack(f[4], f[5]), Rounded::pack(f[6], f[7])}};
  }

  static constexpr int kOffsets = kTransposed || kSteps == 1 ? 1 : kSteps - 1;

  const unsigned char* source_;
  uint64_t offset_[kOffsets];  // bytes from there to the thread's other rows (kRows)
  uint32_t target_;
  int left_;      // of the depth, from this thread's first chunk on
  int valid_;     // elements of a chunk (kColumns)
  int64_t step_;  // bytes between the chunks of this thread (kColumns)
  bool is_float_;
};

LK_DEVICE Vec16 vec16_of(const float (&f)[4]) { return {{bits_of(f[0]), bits_of(f[1]), bits_of(f[2]), bits_of(f[3])}}; }

// Two neighbours, rounded to elements.
template <class Element>
LK_DEVICE void store_shared_pair(uint32_t address, float low, float high) {
  if constexpr (sizeof(typename Element::Storage) == 2) {
    store_shared_4(address, Element::pack(low, high));
  } else {
    store_shared_8(address, Float2{low, high});
  }
}

// The same to memory.
template <class Element>
LK_DEVICE void store_global_pair(typename Element::Storage* target, Float2 v) {
  if constexpr (sizeof(typename Element::Storage) == 2) {
    store_global(reinterpret_cast<uint32_t*>(target), Element::pack(v.x, v.y));
  } else {
    store_global(reinterpret_cast<Float2*>(target), v);
  }
}

// Writes a [kRows, kColumns] tile, staged in shared memory by all threads, to rows and columns of `out` that exist.
template <class Element, int kRows, int kColumns, int kThreads, bool kAligned>
LK_DEVICE void store_tile(uint32_t smem, void* out, int64_t stride, int rows, int columns, int row0, int column0) {
  using Storage = typename Element::Storage;
  using Tile = SharedTile<kColumns, sizeof(Storage)>;
  constexpr int kTotal = kRows * Tile::kChunks, kPerWord = 4 / sizeof(Storage);
  for (int i = thread_index(); i < kTotal; i += kThreads) {
    const int row = i / Tile::kChunks, chunk = i % Tile::kChunks, column = column0 + chunk * Tile::kChunkElements;
    if (row0 + row >= rows || column >= columns) continue;
    const Vec16 v = load_shared_16(smem + Tile::offset(row, chunk));
    Storage* target = static_cast<Storage*>(out) + (row0 + row) * stride + column;
    if constexpr (kAligned) {
      store_global(reinterpret_cast<Vec16*>(target), v);
    } else {
      for (int j = 0; j < Tile::kChunkElements; ++j) {
        const uint32_t bits = v.word[j / kPerWord] >> (16 * (j % kPerWord));
        if (column + j < columns) store_global(target + j, static_cast<Storage>(bits));
      }
    }
  }
}

// What a main loop does besides its product: nothing. Others may bring something along with a stage that is being
// filled, and use a stage that has arrived, or change it (kChanges: then all threads see the change).
struct Alone {
  static constexpr bool kChanges = false;
  LK_DEVICE void load(uint32_t) const {}
  LK_DEVICE void arrived(uint32_t, int) const {}
};

// One block's tile: kM x kN, kDepth of the reduction at a time, kStages of them under way. A stage has kBesideBytes for
// what is brought along.
template <class Element_, int kM_, int kN_, int kDepth_, int kWarpsM_, int kWarpsN_, int kStages_,
          Layout kLayoutP = Layout::kRows, Layout kLayoutQ = Layout::kRows, int kBesideBytes = 0>
struct Gemm {
  using Element = Element_;
  static constexpr int kM = kM_, kN = kN_, kDepth = kDepth_, kStages = kStages_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kThreads = kWarpsM * kWarpsN * kWarp;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
  static constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 8;
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0, "a warp loads fragments of 16 rows of either operand");

  using TileP =
      OperandTile<Element, kM, kDepth, kLayoutP, std::conditional_t<kLayoutP == Layout::kRows, RowsFirst, ChunksFirst>>;
  using TileQ =
      OperandTile<Element, kN, kDepth, kLayoutQ, std::conditional_t<kLayoutQ == Layout::kRows, ChunksFirst, RowsFirst>>;
  static constexpr int kFragmentDepth = TileP::kFragmentDepth, kSteps = kDepth / kFragmentDepth;
  template <bool kAligned>
  using LoaderP = TileLoader<Element, kM, kDepth, kLayoutP, kThreads, kAligned>;
  template <bool kAligned, class Rounded = void>
  using LoaderQ = TileLoader<Element, kN, kDepth, kLayoutQ, kThreads, kAligned, Rounded>;

  static constexpr int kOffsetQ = TileP::kBytes, kOffsetBeside = kOffsetQ + TileQ::kBytes;
  static constexpr int kBytesStage = kOffsetBeside + kBesideBytes;
  static constexpr int kSharedBytes = kStages * kBytesStage;
  static constexpr int kBytesResult = SharedTile<kN, sizeof(typename Element::Storage)>::bytes(kM);

  using Accumulator = float[kFragmentsM][kFragmentsN][4];

  LK_DEVICE static int warp_row() { return thread_index() / kWarp / kWarpsN * kWarpM; }
  LK_DEVICE static int warp_column() { return thread_index() / kWarp % kWarpsN * kWarpN; }

  LK_DEVICE static uint32_t lane_offset_P() { return TileP::lane_offset(warp_row()); }
  LK_DEVICE static uint32_t lane_offset_Q() { return kOffsetQ + TileQ::lane_offset(warp_column()); }

  // f(mi, ni, a, b0, b1) for every fragment product of fragment `step` of one stage's depth.
  template <class F>
  LK_DEVICE static void for_fragments(uint32_t stage, uint32_t offset_P, uint32_t offset_Q, int step, const F& f) {
    uint32_t a[kFragmentsM][4], b[kFragmentsN / 2][4];
    LK_UNROLL
    for (int i = 0; i < kFragmentsM; ++i) TileP::load(a[i], stage + offset_P, i, step);
    LK_UNROLL
    for (int i = 0; i < kFragmentsN / 2; ++i) TileQ::load(b[i], stage + offset_Q, i, step);
    LK_UNROLL
    for (int mi = 0; mi < kFragmentsM; ++mi) {
      LK_UNROLL
      for (int ni = 0; ni < kFragmentsN; ++ni) f(mi, ni, a[mi], b[ni / 2][ni % 2 * 2], b[ni / 2][ni % 2 * 2 + 1]);
    }
  }

  // acc += P[row0 ...] Q[column0 ...]ᵀ over depth [k0, k1). Q may be fp32 where RoundedQ is Element. The last stages
  // may still be read by other warps on return.
  template <bool kAligned, class RoundedQ = void, class Beside>
  LK_DEVICE static void run(uint32_t smem, const Operand& p, int row0, const Operand& q, int column0, int k0, int k1,
                            Accumulator& acc, Beside&& beside) {
    LoaderP<kAligned> load_P({p.data, p.stride, p.rows, k1}, row0, k0);
    LoaderQ<kAligned, RoundedQ> load_Q({q.data, q.stride, q.rows, k1, q.is_float}, column0, k0);
    const auto load_stage = [&](uint32_t stage) {
      load_P.load(stage);
      load_Q.load(stage + kOffsetQ);
      beside.load(stage + kOffsetBeside);
    };
    const int tiles = (k1 - k0 + kDepth - 1) / kDepth;
    LK_UNROLL
    for (int t = 0; t < kStages - 1; ++t) {
      if (t < tiles) load_stage(smem + t * kBytesStage);
      copy_async_commit();
    }
    const uint32_t offset_P = lane_offset_P(), offset_Q = lane_offset_Q();
    uint32_t stage = smem, free_stage = smem + (kStages - 1) * kBytesStage;
    for (int left = tiles; left > 0; --left) {  // counting down costs one register less
      copy_async_wait<kStages - 2>();
      sync_block();  // this stage is here for all, and all have left the stage that is filled next
      if (left >= kStages) load_stage(free_stage);
      copy_async_commit();
      beside.arrived(stage, k0 + (tiles - left) * kDepth);
      if constexpr (std::remove_reference_t<Beside>::kChanges) sync_block();
      LK_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        for_fragments(stage, offset_P, offset_Q, step,
                      [&](int mi, int ni, const uint32_t(&a)[4], uint32_t b0, uint32_t b1) {
                        Element::multiply_add(acc[mi][ni], a, b0, b1);
                      });
      }
      free_stage = stage;
      stage = stage == smem + (kStages - 1) * kBytesStage ? smem : stage + kBytesStage;
    }
  }

  // Unrounded sums of part of the depth, in memory: kPartial floats, each thread's where it alone looks for them.
  static constexpr int kPartial = kM * kN;

  LK_DEVICE static void store_partial(float* partial, const Accumulator& acc) {
    LK_UNROLL
    for (int mi = 0; mi < kFragmentsM; ++mi) {
      LK_UNROLL
      for (int ni = 0; ni < kFragmentsN; ++ni) {
        store_global(place_in_partial(partial, mi, ni), vec16_of(acc[mi][ni]));
      }
    }
  }

  // acc = the sum of `count` partials that follow each other, always in the same order.
  LK_DEVICE static void sum_partials(float* partials, int count, Accumulator& acc) {
    LK_UNROLL
    for (int mi = 0; mi < kFragmentsM; ++mi) {
      LK_UNROLL
      for (int ni = 0; ni < kFragmentsN; ++ni) {
        LK_UNROLL
        for (int j = 0; j < 4; ++j) acc[mi][ni][j] = 0.0f;
        for (int i = 0; i < count; ++i) {
          const Vec16 part = load_global(place_in_partial(partials + i * kPartial, mi, ni));
          LK_UNROLL
          for (int j = 0; j < 4; ++j) acc[mi][ni][j] += float_of(part.word[j]);
        }
      }
    }
  }

  // Stages value(mi, ni, pair) of every accumulator pair in shared memory, as elements of a [kM, kN] tile.
  template <class Value>
  LK_DEVICE static void stage_accumulators(uint32_t smem, const Value& value) {
    using Out = SharedTile<kN, sizeof(typename Element::Storage)>;
    const int lane = thread_index() % kWarp;
    LK_UNROLL
    for (int mi = 0; mi < kFragmentsM; ++mi) {
      LK_UNROLL
      for (int ni = 0; ni < kFragmentsN; ++ni) {
        LK_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int row = warp_row() + mi * 16 + half * 8 + FragmentC::row(lane);
          const int column = warp_column() + ni * 8 + FragmentC::column(lane);
          store_shared_pair<Element>(smem + Out::element_offset(row, column), value(mi, ni, half * 2, column),
                                     value(mi, ni, half * 2 + 1, column + 1));
        }
      }
    }
  }

 private:
  LK_DEVICE static Vec16* place_in_partial(float* partial, int mi, int ni) {
    return reinterpret_cast<Vec16*>(partial) + (mi * kFragmentsN + ni) * kThreads + thread_index();
  }
};

}  // namespace lk
