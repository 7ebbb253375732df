// The kernels that the configs of config.h choose from.
#pragma once

#include "../config.h"
#include "frozen_linear.cuh"
#include "lora_grads.cuh"
#include "lora_linear.cuh"
#include "lora_linear_dual.cuh"

namespace lk {

// A config counts blocks by the shape that it was told; the kernel divides the work by its own.
template <class Base>
constexpr bool has_shape(TileShape tile) {
  return Base::kM == tile.rows && Base::kN == tile.columns && Base::kDepth == tile.depth &&
         Base::kStages == tile.stages;
}

// Bytes beside a stage for a tile of A.
constexpr int beside(int rank_tile, int depth) { return rank_tile * depth * 2; }

// Four warps need the fewest instructions for the large tile, but all registers there are: with the wider rank tile, or
// with w transposed, the compiler spills some. Then there are eight warps, and one block per SM instead of two.
template <int kWarpsN, Layout kLayoutW = Layout::kRows, int kBeside = 0>
using LargeTile = Gemm<128, 128, 32, 2, kWarpsN, 4, Layout::kRows, kLayoutW, kBeside>;
template <Layout kLayoutW = Layout::kRows, int kBeside = 0>
using SmallTile = Gemm<64, 64, 64, 2, 2, 3, Layout::kRows, kLayoutW, kBeside>;
template <int kBeside>
using FlatTile = Gemm<16, 64, 64, 1, 4, 4, Layout::kRows, Layout::kRows, kBeside>;
static_assert(has_shape<LargeTile<2>>(tile_shape(LoraTile::kLarge)));
static_assert(has_shape<SmallTile<>>(tile_shape(LoraTile::kSmall)));
static_assert(has_shape<FlatTile<0>>(tile_shape(LoraTile::kFlat)));

template <class Variant>
LK_KERNEL(Variant::kThreads, Variant::kMinBlocks)
lora_linear_kernel(const LoraLinearParams p) {
  Variant::run(p);
}

template <class Variant>
LK_KERNEL(Variant::kThreads, Variant::kMinBlocks)
lora_grads_kernel(const LoraGradsParams p) {
  Variant::run(p);
}

// f(Variant{}) for the variant that a config of lora_linear asks for.
template <class Element, class F>
auto with_lora_linear_variant(const LoraLinearConfig& config, const F& f) {
  constexpr Direction kForward = Direction::kForward;
  const bool narrow = config.rank_tile == 16;
  if (config.schedule == Schedule::kDecode) {
    return narrow ? f(LoraLinearDual<Element, FlatTile<beside(16, 64)>, 16, true>{})
                  : f(LoraLinearDual<Element, FlatTile<beside(64, 64)>, 64, true>{});
  }
  if (config.schedule == Schedule::kDual) {
    return narrow ? f(LoraLinearDual<Element, SmallTile<Layout::kRows, beside(16, 64)>, 16, true>{})
                  : f(LoraLinearDual<Element, SmallTile<Layout::kRows, beside(64, 64)>, 64, true>{});
  }
  if (config.schedule == Schedule::kColumn0) {
    return f(LoraLinear<Element, LargeTile<4, Layout::kRows, beside(64, 32)>, 64, true, kForward, true>{});
  }
  if (!config.aligned) {
    return narrow ? f(LoraLinear<Element, SmallTile<>, 16, false, kForward>{})
                  : f(LoraLinear<Element, SmallTile<>, 64, false, kForward>{});
  }
  if (config.tile == LoraTile::kSmall) {
    return narrow ? f(LoraLinear<Element, SmallTile<>, 16, true, kForward>{})
                  : f(LoraLinear<Element, SmallTile<>, 64, true, kForward>{});
  }
  return narrow ? f(LoraLinear<Element, LargeTile<2>, 16, true, kForward>{})
                : f(LoraLinear<Element, LargeTile<4>, 64, true, kForward>{});
}

// The same for the gradient of x.
template <class Element, class F>
auto with_lora_grad_x_variant(const LoraLinearConfig& config, const F& f) {
  constexpr Direction kBackward = Direction::kBackward;
  constexpr Layout kColumns = Layout::kColumns;
  const bool narrow = config.rank_tile == 16;
  if (!config.aligned) {
    return narrow ? f(LoraLinear<Element, SmallTile<kColumns>, 16, false, kBackward>{})
                  : f(LoraLinear<Element, SmallTile<kColumns>, 64, false, kBackward>{});
  }
  if (config.tile == LoraTile::kSmall) {
    return narrow ? f(LoraLinear<Element, SmallTile<kColumns>, 16, true, kBackward>{})
                  : f(LoraLinear<Element, SmallTile<kColumns>, 64, true, kBackward>{});
  }
  return narrow ? f(LoraLinear<Element, LargeTile<4, kColumns>, 16, true, kBackward>{})
                : f(LoraLinear<Element, LargeTile<4, kColumns>, 64, true, kBackward>{});
}

template <class Element, class F>
auto with_lora_grads_variant(const LoraGradsConfig& config, const F& f) {
  const bool narrow = config.rank_tile == 16;
  if (!config.aligned) return narrow ? f(LoraGrads<Element, 16, false>{}) : f(LoraGrads<Element, 64, false>{});
  return narrow ? f(LoraGrads<Element, 16, true>{}) : f(LoraGrads<Element, 64, true>{});
}

// The forward's base product alone.
template <class Element, class F>
auto with_frozen_linear_variant(const LoraLinearConfig& config, const F& f) {
  if (!config.aligned) return f(FrozenLinear<Element, SmallTile<>, false>{});
  if (config.tile == LoraTile::kSmall) return f(FrozenLinear<Element, SmallTile<>, true>{});
  return f(FrozenLinear<Element, LargeTile<2>, true>{});
}

}  // namespace lk
