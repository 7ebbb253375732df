// What kernels ask of a main loop, whichever instructions it uses, and what it asks of them.
#pragma once

#include <concepts>

#include "operand.cuh"

namespace lk {

// acc += P Qᵀ for a [kM, kN] tile. Besides what is checked here:
// - run<ChunkP, ChunkQ>(smem, p, row0, q, column0, k0, k1, acc, task) adds the products over depth [k0, k1), and calls
//   the side task for every stage;
// - warp_row() and warp_column() say where a warp's part of the tile is, which consists of kFragmentsM x kFragmentsN
//   fragments of 16 x 8 (FragmentC), the accumulators;
// - stages for who multiplies something more with the same fragments (LoraBranch, ShrinkTask): kStages of them,
//   kBytesStage long, TileP first and TileQ at kOffsetQ, filled by LoaderP and LoaderQ; for_fragments multiplies
//   kFragmentDepth of one.
template <class T>
concept MainLoop = requires {
  typename T::Element;
  { T::kFactors } -> std::convertible_to<Layout>;
  typename T::Accumulator;
  typename T::TileP;
  typename T::TileQ;
  requires(T::kM == 16 * T::kFragmentsM * T::kWarpsM && T::kN == 8 * T::kFragmentsN * T::kWarpsN);
  requires(T::kThreads == kWarp * T::kWarpsM * T::kWarpsN);
  requires(T::kSharedBytes == T::kStages * T::kBytesStage && T::kBytesStage >= T::kOffsetQ);
  requires(T::kDepth % T::kFragmentDepth == 0);
  { T::warp_row() } -> std::same_as<int>;
  { T::warp_column() } -> std::same_as<int>;
};

// A side task of a main loop, the one that does nothing. Others bring something along with a stage that is being filled
// (`fill`, at kOffsetSide of the stage), and use a stage that is there (`on_stage_ready`, with where its depth begins),
// or change it (kChangesStage: then a barrier shows all threads the change).
struct NoSideTask {
  static constexpr bool kChangesStage = false;
  LK_DEVICE void fill(uint32_t) const {}
  LK_DEVICE void on_stage_ready(uint32_t, int) const {}
};

}  // namespace lk
