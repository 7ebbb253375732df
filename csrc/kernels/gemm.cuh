// The main loop of sm_80 that all LoRA kernels share: acc += P Qᵀ for a [kM, kN] tile, operands streamed through shared
// memory by cp.async and multiplied by mma.sync.
//
// Glossary. P, Q: the operands of M and of N rows (a and b are LoRA's). Stage: kDepth of both in shared memory; kStages
// of them rotate. Prologue: the loads before the loop; epilogue: what becomes of accumulators (store.cuh,
// lora_branch.cuh). Side task: what a loop does with a stage besides the product (NoSideTask). Chunk: 16 bytes, the
// unit of copies, of ldmatrix and of the swizzle (tile.h). Tile scheduler: tickets, acquire_work, release_work
// (between_blocks.cuh).
#pragma once

#include "main_loop.cuh"

namespace lk {

// A product's operands.
struct OperandPair {
  Operand p, q;
};

// One block's tile: kM x kN, kDepth of the reduction at a time, kStages of them under way. A stage has kSideBytes for
// what is brought along.
template <class Element_, int kM_, int kN_, int kDepth_, int kWarpsM_, int kWarpsN_, int kStages_,
          Layout kLayoutP = Layout::kRows, Layout kLayoutQ = Layout::kRows, int kSideBytes = 0>
struct Gemm {
  using Element = Element_;
  static constexpr Layout kFactors = kLayoutQ;
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
  template <class Chunk>
  using LoaderP = TileLoader<Element, kM, kDepth, kLayoutP, kThreads, Chunk>;
  template <class Chunk>
  using LoaderQ = TileLoader<Element, kN, kDepth, kLayoutQ, kThreads, Chunk>;

  static constexpr int kOffsetQ = TileP::kBytes, kOffsetSide = kOffsetQ + TileQ::kBytes;
  static constexpr int kBytesStage = kOffsetSide + kSideBytes;
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

  LK_DEVICE static void multiply_stage(uint32_t stage, uint32_t offset_P, uint32_t offset_Q, Accumulator& acc) {
    LK_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      for_fragments(stage, offset_P, offset_Q, step,
                    [&](int mi, int ni, const uint32_t(&a)[4], uint32_t b0, uint32_t b1) {
                      Element::multiply_add(acc[mi][ni], a, b0, b1);
                    });
    }
  }

  // The stage behind this one, of those that rotate from `first` on.
  LK_DEVICE static uint32_t after(uint32_t stage, uint32_t first) {
    return stage == first + (kStages - 1) * kBytesStage ? first : stage + kBytesStage;
  }

  // acc += P[row0 ...] Q[column0 ...]ᵀ over depth [k0, k1). The last stages may still be read by other warps on return.
  template <class ChunkP, class ChunkQ, class Task>
  LK_DEVICE static void run(uint32_t smem, const Operand& p, int row0, const Operand& q, int column0, int k0, int k1,
                            Accumulator& acc, Task&& task) {
    LoaderP<ChunkP> load_P({p.data, p.stride, p.rows, k1, p.order}, row0, k0);
    LoaderQ<ChunkQ> load_Q({q.data, q.stride, q.rows, k1, q.order}, column0, k0);
    const auto load_stage = [&](uint32_t stage) {
      load_P.load(stage);
      load_Q.load(stage + kOffsetQ);
      task.fill(stage + kOffsetSide);
    };
    const int tiles = (k1 - k0 + kDepth - 1) / kDepth;
    LK_UNROLL
    for (int t = 0; t < kStages - 1; ++t) {  // the prologue
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
      task.on_stage_ready(stage, k0 + (tiles - left) * kDepth);
      if constexpr (std::remove_reference_t<Task>::kChangesStage) sync_block();
      multiply_stage(stage, offset_P, offset_Q, acc);
      free_stage = stage;
      stage = after(stage, smem);
    }
  }

  // acc += the sum of Pᵢ[row0 ...] Qᵢ[column0 ...]ᵀ over `count` pairs of operands, part(i) = {Pᵢ, Qᵢ}, as if the depth
  // of each went on in the next: nobody waits where one ends.
  template <class Chunk, class Part>
  LK_DEVICE static void run_parts(uint32_t smem, int count, const Part& part, int row0, int column0, Accumulator& acc) {
    int i = 0, to_load = depth_tiles(part(0).p);  // of part i
    LoaderP<InParts<Chunk>> load_P(part(0).p, row0, 0);
    LoaderQ<InParts<Chunk>> load_Q(part(0).q, column0, 0);
    const auto skip_what_is_loaded = [&] {
      while (to_load == 0 && ++i < count) {
        load_P.begin(part(i).p);
        load_Q.begin(part(i).q);
        to_load = depth_tiles(part(i).p);
      }
    };
    const auto load_stage = [&](uint32_t stage) {
      load_P.load(stage);
      load_Q.load(stage + kOffsetQ);
      --to_load;
      skip_what_is_loaded();
    };
    skip_what_is_loaded();
    int loaded = 0;  // stages that are not multiplied yet
    LK_UNROLL
    for (int t = 0; t < kStages - 1; ++t) {
      if (to_load > 0) {
        load_stage(smem + t * kBytesStage);
        ++loaded;
      }
      copy_async_commit();
    }
    const uint32_t offset_P = lane_offset_P(), offset_Q = lane_offset_Q();
    uint32_t stage = smem, free_stage = smem + (kStages - 1) * kBytesStage;
    while (loaded > 0) {
      copy_async_wait<kStages - 2>();
      sync_block();  // as in `run`
      if (to_load > 0) {
        load_stage(free_stage);
      } else {
        --loaded;
      }
      copy_async_commit();
      multiply_stage(stage, offset_P, offset_Q, acc);
      free_stage = stage;
      stage = after(stage, smem);
    }
  }

 private:
  LK_DEVICE static int depth_tiles(const Operand& m) { return (static_cast<uint32_t>(m.depth) + kDepth - 1) / kDepth; }
};

}  // namespace lk
