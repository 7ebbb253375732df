// The kernels that the configs of config/lora_linear.h choose from.
#pragma once

#include "../config/lora_linear.h"
#include "lora_grads.cuh"
#include "lora_linear.cuh"
#include "lora_linear_dual.cuh"

namespace lk {

// A config counts blocks by the shape that it was told; the kernel divides the work by its own.
template <class Base>
constexpr bool has_shape(TileShape tile) {
  return Base::kM == tile.rows && Base::kN == tile.columns &&
         Base::kDepth == tile.depth(sizeof(typename Base::Element::Storage)) && Base::kStages == tile.stages;
}

// Bytes beside a stage for a tile of A.
constexpr int beside(int rank_tile, LoraTile tile) { return rank_tile * tile_shape(tile).depth_bytes; }

// Depth of a tile in elements.
template <class Element, LoraTile kTile>
constexpr int kDepthOf = tile_shape(kTile).depth(sizeof(typename Element::Storage));

// Four warps need the fewest instructions for the large tile, but all registers there are: with the wider rank tile,
// with w transposed, or with tf32's conversions, the compiler spills some. Then there are eight warps, and one block
// per SM instead of two.
template <class Element>
constexpr int kFewestWarpsN = sizeof(typename Element::Storage) == 2 ? 2 : 4;
template <class Element, int kWarpsN, Layout kLayoutW = Layout::kRows, int kBeside = 0>
using LargeTile =
    Gemm<Element, 128, 128, kDepthOf<Element, LoraTile::kLarge>, 2, kWarpsN, 4, Layout::kRows, kLayoutW, kBeside>;
template <class Element, Layout kLayoutW = Layout::kRows, int kBeside = 0>
using SmallTile = Gemm<Element, 64, 64, kDepthOf<Element, LoraTile::kSmall>, 2, 2, 3, Layout::kRows, kLayoutW, kBeside>;
template <class Element, int kBeside>
using FlatTile =
    Gemm<Element, 16, 64, kDepthOf<Element, LoraTile::kFlat>, 1, 4, 4, Layout::kRows, Layout::kRows, kBeside>;
static_assert(has_shape<LargeTile<BFloat16, 2>>(tile_shape(LoraTile::kLarge)));
static_assert(has_shape<SmallTile<BFloat16>>(tile_shape(LoraTile::kSmall)));
static_assert(has_shape<FlatTile<BFloat16, 0>>(tile_shape(LoraTile::kFlat)));

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
    return narrow ? f(LoraLinearDual<FlatTile<Element, beside(16, LoraTile::kFlat)>, 16, true>{})
                  : f(LoraLinearDual<FlatTile<Element, beside(64, LoraTile::kFlat)>, 64, true>{});
  }
  if (config.schedule == Schedule::kDual) {
    return narrow ? f(LoraLinearDual<SmallTile<Element, Layout::kRows, beside(16, LoraTile::kSmall)>, 16, true>{})
                  : f(LoraLinearDual<SmallTile<Element, Layout::kRows, beside(64, LoraTile::kSmall)>, 64, true>{});
  }
  if (config.schedule == Schedule::kColumn0) {
    return f(
        LoraLinear<LargeTile<Element, 4, Layout::kRows, beside(64, LoraTile::kLarge)>, 64, true, kForward, true>{});
  }
  if (!config.aligned) {
    return narrow ? f(LoraLinear<SmallTile<Element>, 16, false, kForward>{})
                  : f(LoraLinear<SmallTile<Element>, 64, false, kForward>{});
  }
  if (config.tile == LoraTile::kSmall) {
    return narrow ? f(LoraLinear<SmallTile<Element>, 16, true, kForward>{})
                  : f(LoraLinear<SmallTile<Element>, 64, true, kForward>{});
  }
  return narrow ? f(LoraLinear<LargeTile<Element, kFewestWarpsN<Element>>, 16, true, kForward>{})
                : f(LoraLinear<LargeTile<Element, 4>, 64, true, kForward>{});
}

// The same for the gradient of x.
template <class Element, class F>
auto with_lora_grad_x_variant(const LoraLinearConfig& config, const F& f) {
  constexpr Direction kBackward = Direction::kBackward;
  constexpr Layout kColumns = Layout::kColumns;
  const bool narrow = config.rank_tile == 16;
  if (!config.aligned) {
    return narrow ? f(LoraLinear<SmallTile<Element, kColumns>, 16, false, kBackward>{})
                  : f(LoraLinear<SmallTile<Element, kColumns>, 64, false, kBackward>{});
  }
  if (config.tile == LoraTile::kSmall) {
    return narrow ? f(LoraLinear<SmallTile<Element, kColumns>, 16, true, kBackward>{})
                  : f(LoraLinear<SmallTile<Element, kColumns>, 64, true, kBackward>{});
  }
  return narrow ? f(LoraLinear<LargeTile<Element, 4, kColumns>, 16, true, kBackward>{})
                : f(LoraLinear<LargeTile<Element, 4, kColumns>, 64, true, kBackward>{});
}

template <class Element, class F>
auto with_lora_grads_variant(const LoraGradsConfig& config, const F& f) {
  const bool narrow = config.rank_tile == 16;
  if (!config.aligned) return narrow ? f(LoraGrads<Element, 16, false>{}) : f(LoraGrads<Element, 64, false>{});
  return narrow ? f(LoraGrads<Element, 16, true>{}) : f(LoraGrads<Element, 64, true>{});
}

}  // namespace lk
