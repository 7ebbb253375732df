// Every kernel of multi_lora_linear and its gradients, with its key.
#pragma once

#include "../config/multi_lora_linear.h"
#include "lora_linear_variants.cuh"
#include "multi_lora_branch.cuh"
#include "multi_lora_decode.cuh"

namespace lk {

template <class Variant>
LK_KERNEL(Variant::kThreads, Variant::kMinBlocks)
multi_lora_decode_kernel(const MultiLoraDecodeParams p) {
  Variant::run(p);
}

template <class Variant>
LK_KERNEL(Variant::kThreads, Variant::kMinBlocks)
multi_lora_branch_kernel(const MultiLoraBranchParams p) {
  Variant::run(p);
}

template <class Variant>
LK_KERNEL(Variant::kThreads, Variant::kMinBlocks)
multi_lora_grads_kernel(const MultiLoraGradsParams p) {
  Variant::run(p);
}

template <class Element>
using MultiDecodeVariants =
    VariantList<Variant<forward_key(Schedule::kDecode, LoraTile::kFlat, 0), MultiLoraDecode<FlatTile<Element, 0>>>,
                Variant<forward_key(Schedule::kDecode, LoraTile::kSmall, 0), MultiLoraDecode<SmallTile<Element>>>>;

template <class Element, LoraRole kRole, class Roles>
struct MultiBranchVariantsOf {
  template <LoraTile kTile, int kRankTile>
  using Shrink = Variant<LoraKey{kRole, Schedule::kShrink, kTile, kRankTile, Access::kWhole},
                         MultiLoraShrink<ShrinkTile<Element, kTile, kRankTile, Roles::kFactors>, Roles>>;
  using Type = VariantList<Shrink<LoraTile::kNarrow, 16>, Shrink<LoraTile::kSmall, 64>,
                           Variant<LoraKey{kRole, Schedule::kExpand, LoraTile::kBranch, 0, Access::kWhole},
                                   MultiLoraExpand<BranchTile<Element, Roles::kFactors>, Roles>>>;
};

template <class Element>
using MultiBranchVariants = Concat<typename MultiBranchVariantsOf<Element, LoraRole::kForward, ForwardRoles>::Type,
                                   typename MultiBranchVariantsOf<Element, LoraRole::kGradX, GradXRoles>::Type>;

template <class Element, int kRankTile, Access kAccess>
using MultiGradsVariant =
    Variant<LoraGradsKey{kRankTile, kAccess, true}, MultiLoraGrads<LoraGrads<Element, kRankTile, kAccess, true>>>;
template <class Element, Access kAccess>
using MultiGradsVariantsOf =
    VariantList<MultiGradsVariant<Element, 16, kAccess>, MultiGradsVariant<Element, 64, kAccess>,
                MultiGradsVariant<Element, 128, kAccess>>;
template <class Element>
using MultiGradsVariants =
    Concat<MultiGradsVariantsOf<Element, Access::kWhole>, MultiGradsVariantsOf<Element, Access::kGatherRanks>>;

}  // namespace lk
