// Every kernel of grouped_lora_linear and its gradients, with its key: those of lora_linear where all rows are whole,
// with tiles that look up their group.
#pragma once

#include "../config/grouped_lora_linear.h"
#include "lora_linear_variants.cuh"

namespace lk {

template <class Variant>
LK_KERNEL(Variant::kThreads, Variant::kMinBlocks)
grouped_lora_linear_kernel(const GroupedLoraLinearParams p) {
  Variant::run(p);
}

template <class Variant>
LK_KERNEL(Variant::kThreads, Variant::kMinBlocks)
grouped_lora_grads_kernel(const GroupedLoraGradsParams p) {
  Variant::run(p);
}

template <class Base, int kRankTile, class Roles, bool kOntoY>
using InGroups = LoraLinear<Base, kRankTile, Access::kWhole, Roles, false, ManyGroups, kOntoY>;

// w as the product of a role has it: of the forward as the weight, of the gradient of x as its transpose.
template <class Element, LoraRole kRole, class Roles, bool kWInRows, bool kOntoY = false>
struct GroupedVariantsOf {
  static constexpr Layout kLayoutW = (kRole == LoraRole::kForward) == kWInRows ? Layout::kRows : Layout::kColumns;
  template <LoraTile kTile, class Base, int kRankTile>
  using Of =
      Variant<GroupedLoraKey{kRole, kTile, kRankTile, kWInRows, kOntoY}, InGroups<Base, kRankTile, Roles, kOntoY>>;
  using Type = VariantList<Of<LoraTile::kLarge, LargeTile<Element, 4, kLayoutW>, 16>,
                           Of<LoraTile::kLarge, LargeTile<Element, 4, kLayoutW>, 64>,
                           Of<LoraTile::kSmall, SmallTile<Element, kLayoutW>, 16>,
                           Of<LoraTile::kSmall, SmallTile<Element, kLayoutW>, 64>>;
};

template <class Element>
using GroupedForwardVariants =
    Concat<typename GroupedVariantsOf<Element, LoraRole::kForward, ForwardRoles, true>::Type,
           typename GroupedVariantsOf<Element, LoraRole::kForward, ForwardRoles, false>::Type,
           typename GroupedVariantsOf<Element, LoraRole::kForward, ForwardRoles, true, true>::Type>;
template <class Element>
using GroupedGradXVariants =
    Concat<typename GroupedVariantsOf<Element, LoraRole::kGradX, PlainGradXRoles, true>::Type,
           typename GroupedVariantsOf<Element, LoraRole::kGradX, PlainGradXRoles, false>::Type,
           typename GroupedVariantsOf<Element, LoraRole::kGradX, PlainGradXRoles, true, true>::Type>;

template <class Element, int kRankTile>
using GroupedGradsVariant = Variant<LoraGradsKey{kRankTile, Access::kWhole, true},
                                    GroupedLoraGrads<LoraGrads<Element, kRankTile, Access::kWhole, true>>>;
template <class Element>
using GroupedGradsVariants =
    VariantList<GroupedGradsVariant<Element, 16>, GroupedGradsVariant<Element, 64>, GroupedGradsVariant<Element, 128>>;

}  // namespace lk
