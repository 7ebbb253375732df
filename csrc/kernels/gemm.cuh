// The main loop that all LoRA kernels share: acc += P Qᵀ for a [kM, kN] tile, operands streamed through shared memory.
#pragma once

#include "../tile.h"

namespace lk {

// kRows x kDepth of a row-major matrix, 16-bit elements.
struct Operand {
  const uint16_t* data;
  int64_t stride;
  int32_t rows, depth;
};

// Brings rows [row0, row0 + kRows) of an operand into shared memory, kDepth columns at a time. Rows past the end repeat
// the last one, whose products nobody stores; columns past the end are zero, in both operands, because NaN · 0 is NaN.
template <int kRows, int kDepth, int kThreads, bool kAligned>
class TileLoader {
  using Tile = SharedTile<kDepth>;
  static constexpr int kRowStep =
      kThreads / Tile::kChunks;  // a thread's chunks lie in one column, this many rows apart
  static constexpr int kSteps = (kRows + kRowStep - 1) / kRowStep;
  static_assert(kThreads % Tile::kChunks == 0 && kRowStep % 8 == 0, "a thread's rows have the same turn");

 public:
  LK_DEVICE TileLoader(const Operand& m, int row0, int k0)
      : k_(k0 + thread_index() % Tile::kChunks * kChunkElements), depth_(m.depth) {
    const int row = thread_index() / Tile::kChunks;
    target_ = Tile::offset(row, thread_index() % Tile::kChunks);
    LK_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      const int row_gmem = row0 + row + i * kRowStep;
      source_[i] = m.data + (row_gmem < m.rows ? row_gmem : m.rows - 1) * m.stride + k_;
    }
  }

  // The next kDepth columns.
  LK_DEVICE void load(uint32_t smem) {
    const int bytes = k_ < depth_ ? kChunkBytes : 0;  // aligned: depth is a multiple of a chunk
    LK_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      if (kRows % kRowStep != 0 && thread_index() / Tile::kChunks + i * kRowStep >= kRows) break;
      const uint32_t address = smem + target_ + i * kRowStep * Tile::kRowBytes;
      if constexpr (kAligned) {
        copy_async_16(address, source_[i], bytes);
      } else {
        store_shared_16(address, gather(source_[i], depth_ - k_));
      }
      source_[i] += kDepth;
    }
    k_ += kDepth;
  }

 private:
  // A chunk at any address, element by element; zero from element `valid` on.
  LK_DEVICE static Vec16 gather(const uint16_t* source, int valid) {
    Vec16 v = {};
    LK_UNROLL
    for (int j = 0; j < kChunkElements; ++j) {
      const uint32_t bits = j < valid ? load_global(source + j) : 0u;
      v.word[j / 2] |= bits << (16 * (j % 2));
    }
    return v;
  }

  const uint16_t* source_[kSteps];
  uint32_t target_;
  int k_, depth_;
};

// Writes a [kRows, kColumns] tile, staged in shared memory by all threads, to rows and columns of `out` that exist.
template <int kRows, int kColumns, int kThreads, bool kAligned>
LK_DEVICE void store_tile(uint32_t smem, uint16_t* out, int64_t stride, int rows, int columns, int row0, int column0) {
  using Tile = SharedTile<(kColumns < 32 ? 32 : kColumns)>;
  constexpr int kChunks = kColumns / kChunkElements, kTotal = kRows * kChunks;
  for (int i = thread_index(); i < kTotal; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks, column = column0 + chunk * kChunkElements;
    if (row0 + row >= rows || column >= columns) continue;
    const Vec16 v = load_shared_16(smem + Tile::offset(row, chunk));
    uint16_t* target = out + (row0 + row) * stride + column;
    if constexpr (kAligned) {
      store_global(reinterpret_cast<Vec16*>(target), v);
    } else {
      for (int j = 0; j < kChunkElements; ++j) {
        if (column + j < columns) store_global(target + j, static_cast<uint16_t>(v.word[j / 2] >> (16 * (j % 2))));
      }
    }
  }
}

// One block's tile: kM x kN, kDepth of the reduction at a time, kStages of them under way.
template <int kM_, int kN_, int kDepth_, int kWarpsM, int kWarpsN, int kStages_>
struct Gemm {
  static constexpr int kM = kM_, kN = kN_, kDepth = kDepth_, kStages = kStages_;
  static constexpr int kThreads = kWarpsM * kWarpsN * kWarp;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
  static constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 8;
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0, "a warp loads fragments of 16 rows of either operand");
  using Tile = SharedTile<kDepth>;
  static constexpr int kBytesP = Tile::bytes(kM), kBytesStage = kBytesP + Tile::bytes(kN);
  static constexpr int kSharedBytes = kStages * kBytesStage;

  using Accumulator = float[kFragmentsM][kFragmentsN][4];

  LK_DEVICE static int warp_row() { return thread_index() / kWarp / kWarpsN * kWarpM; }
  LK_DEVICE static int warp_column() { return thread_index() / kWarp % kWarpsN * kWarpN; }

  // Address of this lane's row of the warp's first fragment, in P's and Q's part of a stage.
  LK_DEVICE static uint32_t lane_offset_P() {
    const int lane = thread_index() % kWarp;
    return Tile::offset(warp_row() + FragmentA::row(lane), FragmentA::chunk(lane));
  }
  LK_DEVICE static uint32_t lane_offset_Q() {
    const int lane = thread_index() % kWarp;
    return kBytesP + Tile::offset(warp_column() + FragmentB::row(lane), FragmentB::chunk(lane));
  }

  // f(mi, ni, a, b0, b1) for every fragment product in columns [16 step, 16 step + 16) of one stage.
  template <class F>
  LK_DEVICE static void for_fragments(uint32_t stage, uint32_t offset_P, uint32_t offset_Q, int step, const F& f) {
    // Sixteen rows on, a row's turn is the same; two chunks on, it is an exclusive or.
    const uint32_t from_P = (stage + offset_P) ^ (step * 2 * kChunkBytes);
    const uint32_t from_Q = (stage + offset_Q) ^ (step * 2 * kChunkBytes);
    uint32_t a[kFragmentsM][4], b[kFragmentsN / 2][4];
    LK_UNROLL
    for (int i = 0; i < kFragmentsM; ++i) load_matrix_x4(a[i], from_P + i * 16 * Tile::kRowBytes);
    LK_UNROLL
    for (int i = 0; i < kFragmentsN / 2; ++i) load_matrix_x4(b[i], from_Q + i * 16 * Tile::kRowBytes);
    LK_UNROLL
    for (int mi = 0; mi < kFragmentsM; ++mi) {
      LK_UNROLL
      for (int ni = 0; ni < kFragmentsN; ++ni) f(mi, ni, a[mi], b[ni / 2][ni % 2 * 2], b[ni / 2][ni % 2 * 2 + 1]);
    }
  }

  // acc += P[row0 ...] Q[column0 ...]ᵀ. `prepare(stage, k0)` may change a stage that has arrived; if kPrepares, every
  // thread sees the change. The last stages may still be read by other warps on return.
  template <class Element, bool kAligned, bool kPrepares, class Prepare>
  LK_DEVICE static void run(uint32_t smem, const Operand& p, int row0, const Operand& q, int column0, Accumulator& acc,
                            const Prepare& prepare) {
    TileLoader<kM, kDepth, kThreads, kAligned> load_P(p, row0, 0);
    TileLoader<kN, kDepth, kThreads, kAligned> load_Q(q, column0, 0);
    const auto load_stage = [&](uint32_t stage) {
      load_P.load(stage);
      load_Q.load(stage + kBytesP);
    };
    const int tiles = (p.depth + kDepth - 1) / kDepth;
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
      if constexpr (kPrepares) {
        prepare(stage, (tiles - left) * kDepth);
        sync_block();
      }
      LK_UNROLL
      for (int step = 0; step < kDepth / 16; ++step) {
        for_fragments(stage, offset_P, offset_Q, step,
                      [&](int mi, int ni, const uint32_t(&a)[4], uint32_t b0, uint32_t b1) {
                        Element::multiply_add(acc[mi][ni], a, b0, b1);
                      });
      }
      free_stage = stage;
      stage = stage == smem + (kStages - 1) * kBytesStage ? smem : stage + kBytesStage;
    }
  }

  // Stages value(mi, ni, pair) of every accumulator pair in shared memory, as 16-bit elements of a [kM, kN] tile.
  template <class Element, class Value>
  LK_DEVICE static void stage_accumulators(uint32_t smem, const Value& value) {
    using Out = SharedTile<(kN < 32 ? 32 : kN)>;
    const int lane = thread_index() % kWarp;
    LK_UNROLL
    for (int mi = 0; mi < kFragmentsM; ++mi) {
      LK_UNROLL
      for (int ni = 0; ni < kFragmentsN; ++ni) {
        LK_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int row = warp_row() + mi * 16 + half * 8 + FragmentC::row(lane);
          const int column = warp_column() + ni * 8 + FragmentC::column(lane);
          const uint32_t address = smem + Out::offset(row, column / kChunkElements) + column % kChunkElements * 2;
          store_shared_4(address,
                         Element::pack(value(mi, ni, half * 2, column), value(mi, ni, half * 2 + 1, column + 1)));
        }
      }
    }
  }
};

}  // namespace lk
