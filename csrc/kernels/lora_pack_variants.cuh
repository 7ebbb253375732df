// Every kernel of lora_pack and of its gradient of x, with its key: those of lora_linear where all rows are whole, with
// tiles that look up their member.
#pragma once

#include "../config/lora_pack.h"
#include "lora_linear_variants.cuh"

namespace lk {

template <class Variant>
LK_KERNEL(Variant::kThreads, Variant::kMinBlocks)
lora_pack_kernel(const LoraPackParams p) {
  Variant::run(p);
}

template <class Element, LoraRole kRole, class Roles>
struct PackVariantsOf {
  static constexpr bool kSums = kRole == LoraRole::kGradX;
  static constexpr Layout kLayoutW = kSums ? Layout::kColumns : Layout::kRows;
  template <LoraTile kTile, class Base, int kRankTile>
  using Of = Variant<LoraPackKey{kRole, kTile, kRankTile},
                     LoraLinear<Base, kRankTile, Access::kWhole, Roles, false, Members<kSums>>>;
  using Type = VariantList<Of<LoraTile::kLarge, LargeTile<Element, 4, kLayoutW>, 16>,
                           Of<LoraTile::kLarge, LargeTile<Element, 4, kLayoutW>, 64>,
                           Of<LoraTile::kSmall, SmallTile<Element, kLayoutW>, 16>,
                           Of<LoraTile::kSmall, SmallTile<Element, kLayoutW>, 64>>;
};

template <class Element>
using PackVariants = Concat<typename PackVariantsOf<Element, LoraRole::kForward, ForwardRoles>::Type,
                            typename PackVariantsOf<Element, LoraRole::kGradX, PlainGradXRoles>::Type>;

}  // namespace lk
