// What kernels ask of a main loop, whichever instructions it uses, and what it asks of them.
#pragma once

#include <concepts>

#include "operand.cuh"

namespace lk {

// acc += P Qᵀ for a [kM, kN] tile. Besides what is checked here:
// - run<ChunkP, ChunkQ>(smem, p, row0, q, column0, k0, k1, acc, task) adds the products over depth [k0, k1), and calls
//   the task for every stage;
// - warp_row() and warp_column() say where a warp's part of the tile is, which consists of kFragmentsM x kFragmentsN
//   fragments of 16 x 8 (FragmentC), the accumulators;
// - stages for who multiplies something more with the same fragments (LoraBranch, ShrinkBeside): kStages of them,
//   kBytesStage long, TileP first and TileQ at kOffsetQ, filled by LoaderP and LoaderQ; for_fragments multiplies
//   kFragmentDepth of one.
template <class T>
concept MainLoop = requires {
  typename T::Element;
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

// What a main loop does besides its product: nothing. Others may bring something along with a stage that is being
// filled, and use a stage that has arrived, or change it (kChanges: then all threads see the change).
struct Alone {
  static constexpr bool kChanges = false;
  LK_DEVICE void load(uint32_t) const {}
  LK_DEVICE void arrived(uint32_t, int) const {}
};

}  // namespace lk
