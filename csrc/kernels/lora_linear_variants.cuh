// The kernels that the configs of config/lora_linear.h choose from.
#pragma once

#include "../config/lora_linear.h"
#include "lora_grads.cuh"
#include "lora_linear.cuh"
#include "lora_linear_dual.cuh"
#include "lora_shrink_expand.cuh"
#include "variants.h"

namespace lk {

// A config counts blocks by the shape that it was told; the kernel divides the work by its own.
template <class Base>
constexpr bool has_shape(TileShape tile) {
  return Base::kM == tile.rows && Base::kN == tile.columns &&
         Base::kDepth == tile.depth(sizeof(typename Base::Element::Storage)) && Base::kStages == tile.stages;
}

// Bytes of a stage for the side task's tile of A.
constexpr int side_bytes(int rank_tile, LoraTile tile) { return rank_tile * tile_shape(tile).depth_bytes; }

// Depth of a tile in elements.
template <class Element, LoraTile kTile>
constexpr int kDepthOf = tile_shape(kTile).depth(sizeof(typename Element::Storage));

// Four warps need the fewest instructions for the large tile, but all registers there are: with the wider rank tile,
// with w transposed, or with tf32's conversions, the compiler spills some. Then there are eight warps, and one block
// per SM instead of two.
template <class Element>
constexpr int kFewestWarpsN = sizeof(typename Element::Storage) == 2 ? 2 : 4;
template <class Element, int kWarpsN, Layout kLayoutW = Layout::kRows, int kSide = 0>
using LargeTile =
    Gemm<Element, 128, 128, kDepthOf<Element, LoraTile::kLarge>, 2, kWarpsN, 4, Layout::kRows, kLayoutW, kSide>;
template <class Element, Layout kLayoutW = Layout::kRows, int kSide = 0>
using SmallTile = Gemm<Element, 64, 64, kDepthOf<Element, LoraTile::kSmall>, 2, 2, 3, Layout::kRows, kLayoutW, kSide>;
template <class Element, int kSide>
using FlatTile =
    Gemm<Element, 16, 64, kDepthOf<Element, LoraTile::kFlat>, 1, 4, 4, Layout::kRows, Layout::kRows, kSide>;
// Of s alone, and of the branch alone.
template <class Element, LoraTile kTile, int kRankTile, Layout kFactors = Layout::kRows>
using ShrinkTile =
    Gemm<Element, 64, kRankTile, kDepthOf<Element, kTile>, 4, 1, tile_shape(kTile).stages, Layout::kRows, kFactors>;
template <class Element, Layout kFactors>
using BranchTile = Gemm<Element, 128, 128, kDepthOf<Element, LoraTile::kBranch>, 2, 4, 2, Layout::kRows, kFactors>;
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

// A kernel and the config that asks for it, which must agree.
template <LoraKey kKey, class Kernel>
struct LoraVariant : Variant<kKey, Kernel> {
  static_assert(Kernel::kAccess == kKey.access && Kernel::kRankTile == kKey.rank_tile);
  static_assert(has_shape<typename Kernel::Base>(tile_shape(kKey.tile)));
};

constexpr LoraKey forward_key(Schedule schedule, LoraTile tile, int rank_tile, Access access = Access::kWhole) {
  return {LoraRole::kForward, schedule, tile, rank_tile, access};
}
constexpr LoraKey grad_x_key(LoraTile tile, int rank_tile, Access access) {
  return {LoraRole::kGradX, Schedule::kTicketed, tile, rank_tile, access};
}

// Every kernel of lora_linear in one launch...
template <class Element, Access kAccess>
using LoraTicketedVariants =
    VariantList<LoraVariant<forward_key(Schedule::kTicketed, LoraTile::kLarge, 16, kAccess),
                            LoraLinear<LargeTile<Element, kFewestWarpsN<Element>>, 16, kAccess, ForwardRoles>>,
                LoraVariant<forward_key(Schedule::kTicketed, LoraTile::kLarge, 64, kAccess),
                            LoraLinear<LargeTile<Element, 4>, 64, kAccess, ForwardRoles>>,
                LoraVariant<forward_key(Schedule::kTicketed, LoraTile::kSmall, 16, kAccess),
                            LoraLinear<SmallTile<Element>, 16, kAccess, ForwardRoles>>,
                LoraVariant<forward_key(Schedule::kTicketed, LoraTile::kSmall, 64, kAccess),
                            LoraLinear<SmallTile<Element>, 64, kAccess, ForwardRoles>>,
                LoraVariant<forward_key(Schedule::kDecode, LoraTile::kFlat, 16, kAccess),
                            LoraLinearDual<FlatTile<Element, side_bytes(16, LoraTile::kFlat)>, 16, kAccess>>,
                LoraVariant<forward_key(Schedule::kDecode, LoraTile::kFlat, 64, kAccess),
                            LoraLinearDual<FlatTile<Element, side_bytes(64, LoraTile::kFlat)>, 64, kAccess>>>;

// ... where all rows are whole...
template <class Element>
using LoraWholeVariants =
    VariantList<LoraVariant<forward_key(Schedule::kColumn0, LoraTile::kLarge, 64),
                            LoraLinear<LargeTile<Element, 4, Layout::kRows, side_bytes(64, LoraTile::kLarge)>, 64,
                                       Access::kWhole, ForwardRoles, true>>,
                LoraVariant<forward_key(Schedule::kDual, LoraTile::kSmall, 16),
                            LoraLinearDual<SmallTile<Element, Layout::kRows, side_bytes(16, LoraTile::kSmall)>, 16,
                                           Access::kWhole>>,
                LoraVariant<forward_key(Schedule::kDual, LoraTile::kSmall, 64),
                            LoraLinearDual<SmallTile<Element, Layout::kRows, side_bytes(64, LoraTile::kSmall)>, 64,
                                           Access::kWhole>>>;

// ... of the gradient of x in one...
template <class Element, Access kAccess>
using LoraGradXTicketedVariants =
    VariantList<LoraVariant<grad_x_key(LoraTile::kLarge, 16, kAccess),
                            LoraLinear<LargeTile<Element, 4, Layout::kColumns>, 16, kAccess, GradXRoles>>,
                LoraVariant<grad_x_key(LoraTile::kLarge, 64, kAccess),
                            LoraLinear<LargeTile<Element, 4, Layout::kColumns>, 64, kAccess, GradXRoles>>,
                LoraVariant<grad_x_key(LoraTile::kSmall, 16, kAccess),
                            LoraLinear<SmallTile<Element, Layout::kColumns>, 16, kAccess, GradXRoles>>,
                LoraVariant<grad_x_key(LoraTile::kSmall, 64, kAccess),
                            LoraLinear<SmallTile<Element, Layout::kColumns>, 64, kAccess, GradXRoles>>>;

// ... of either beside the vendor's product...
template <class Element, LoraRole kRole, class Roles, Access kAccess>
using ExpandVariant = LoraVariant<LoraKey{kRole, Schedule::kExpand, LoraTile::kBranch, 0, kAccess},
                                  LoraExpand<BranchTile<Element, Roles::kFactors>, kAccess, Roles>>;
template <class Element, Access kAccess>
using ShrinkVariants = VariantList<LoraVariant<forward_key(Schedule::kShrink, LoraTile::kNarrow, 16, kAccess),
                                               LoraShrink<ShrinkTile<Element, LoraTile::kNarrow, 16>, kAccess>>,
                                   LoraVariant<forward_key(Schedule::kShrink, LoraTile::kSmall, 64, kAccess),
                                               LoraShrink<ShrinkTile<Element, LoraTile::kSmall, 64>, kAccess>>,
                                   LoraVariant<forward_key(Schedule::kShrink, LoraTile::kWide, 128, kAccess),
                                               LoraShrink<ShrinkTile<Element, LoraTile::kWide, 128>, kAccess>>>;

template <class Element>
using LoraForwardVariants =
    Concat<LoraTicketedVariants<Element, Access::kWhole>, LoraTicketedVariants<Element, Access::kGatherRanks>,
           LoraWholeVariants<Element>, ShrinkVariants<Element, Access::kWhole>,
           ShrinkVariants<Element, Access::kGatherRanks>, ShrinkVariants<Element, Access::kGatherAll>,
           VariantList<ExpandVariant<Element, LoraRole::kForward, ForwardRoles, Access::kWhole>,
                       ExpandVariant<Element, LoraRole::kForward, ForwardRoles, Access::kGatherRanks>>>;

template <class Element>
using LoraGradXVariants =
    Concat<LoraGradXTicketedVariants<Element, Access::kWhole>, LoraGradXTicketedVariants<Element, Access::kGatherRanks>,
           VariantList<ExpandVariant<Element, LoraRole::kGradX, GradXRoles, Access::kWhole>,
                       ExpandVariant<Element, LoraRole::kGradX, GradXRoles, Access::kGatherRanks>,
                       ExpandVariant<Element, LoraRole::kGradX, GradXRoles, Access::kGatherAll>>>;

// ... and of the adapter's gradients.
template <class Element, int kRankTile, Access kAccess, bool kGradYIsWhole>
using LoraGradsVariant =
    Variant<LoraGradsKey{kRankTile, kAccess, kGradYIsWhole}, LoraGrads<Element, kRankTile, kAccess, kGradYIsWhole>>;
template <class Element, Access kAccess, bool kGradYIsWhole>
using LoraGradsVariantsOf = VariantList<LoraGradsVariant<Element, 16, kAccess, kGradYIsWhole>,
                                        LoraGradsVariant<Element, 64, kAccess, kGradYIsWhole>,
                                        LoraGradsVariant<Element, 128, kAccess, kGradYIsWhole>>;
template <class Element>
using LoraGradsVariants =
    Concat<LoraGradsVariantsOf<Element, Access::kWhole, true>, LoraGradsVariantsOf<Element, Access::kGatherRanks, true>,
           LoraGradsVariantsOf<Element, Access::kGatherRanks, false>,
           LoraGradsVariantsOf<Element, Access::kGatherAll, false>>;

}  // namespace lk
