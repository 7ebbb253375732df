// The kernels that lora_linear_config chooses from.
#pragma once

#include "../config.h"
#include "lora_linear.cuh"

namespace lk {

// Four warps need the fewest instructions for the large tile, but all registers there are, and with the wider rank tile
// the compiler spills one of them on sm_90: then there are eight warps, and one block per SM instead of two.
template <class Element>
using LoraLinearLarge16 = LoraLinear<Element, Gemm<128, 128, 32, 2, 2, 4>, 16, true>;
template <class Element>
using LoraLinearLarge64 = LoraLinear<Element, Gemm<128, 128, 32, 2, 4, 4>, 64, true>;
template <class Element, int kRankTile, bool kAligned>
using LoraLinearSmall = LoraLinear<Element, Gemm<64, 64, 64, 2, 2, 3>, kRankTile, kAligned>;

// A config counts blocks by the shape that it was told; the kernel divides the work by its own.
template <class Base>
constexpr bool has_shape(TileShape tile) {
  return Base::kM == tile.rows && Base::kN == tile.columns && Base::kDepth == tile.depth &&
         Base::kStages == tile.stages && Base::kSharedBytes == tile.shared_bytes();
}
static_assert(has_shape<LoraLinearLarge16<BFloat16>::Base>(tile_shape(LoraTile::kLarge)));
static_assert(has_shape<LoraLinearLarge64<BFloat16>::Base>(tile_shape(LoraTile::kLarge)));
static_assert(has_shape<LoraLinearSmall<BFloat16, 16, true>::Base>(tile_shape(LoraTile::kSmall)));

template <class Variant>
LK_KERNEL(Variant::kThreads, Variant::kMinBlocks)
lora_linear_kernel(const LoraLinearParams p) {
  Variant::run(p);
}

// f(Variant{}) for the variant that a config asks for.
template <class Element, class F>
auto with_lora_linear_variant(const LoraLinearConfig& config, const F& f) {
  const bool narrow = config.rank_tile == 16;
  if (!config.aligned) {
    return narrow ? f(LoraLinearSmall<Element, 16, false>{}) : f(LoraLinearSmall<Element, 64, false>{});
  }
  if (config.tile == LoraTile::kSmall) {
    return narrow ? f(LoraLinearSmall<Element, 16, true>{}) : f(LoraLinearSmall<Element, 64, true>{});
  }
  return narrow ? f(LoraLinearLarge16<Element>{}) : f(LoraLinearLarge64<Element>{});
}

}  // namespace lk
