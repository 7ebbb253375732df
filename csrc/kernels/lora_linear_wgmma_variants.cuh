// The kernels that config/lora_linear_wgmma.h chooses from.
#pragma once

#include "../config/lora_linear_wgmma.h"
#include "lora_linear_wgmma.cuh"
#include "variants.h"

namespace lk {

// A map of the copy engine must lie where parameters do.
#if defined(__CUDACC__)
#define LK_GRID_CONSTANT __grid_constant__
#else
#define LK_GRID_CONSTANT
#endif

template <class Variant>
LK_KERNEL(Variant::kThreads, 1)
lora_linear_wgmma_kernel(const LK_GRID_CONSTANT LoraWgmmaParams p) {
  Variant::run(p);
}

#undef LK_GRID_CONSTANT

template <class Element, LoraRole kRole, LoraTile kTile, int kRankTile, int kCluster = 1>
struct LoraWgmmaVariant
    : Variant<LoraKey{kRole, Schedule::kWgmma, kTile, kRankTile, Access::kWhole, kCluster},
              LoraLinearWgmma<Element, tile_shape(kTile).columns, kRankTile, kRole == LoraRole::kGradX, kCluster>> {
  using Kernel = typename LoraWgmmaVariant::Variant::Kernel;
  static_assert(Kernel::kM == tile_shape(kTile).rows && Kernel::kStages == tile_shape(kTile).stages);
  static_assert(Kernel::kDepth == tile_shape(kTile).depth(2) && Kernel::kSharedBytes <= kWgmmaSharedBytes);
};

template <class Element, LoraRole kRole>
using LoraWgmmaVariants = VariantList<LoraWgmmaVariant<Element, kRole, LoraTile::kWgmma, 16>,
                                      LoraWgmmaVariant<Element, kRole, LoraTile::kWgmma, 48>,
                                      LoraWgmmaVariant<Element, kRole, LoraTile::kNarrowWgmma, 16>,
                                      LoraWgmmaVariant<Element, kRole, LoraTile::kNarrowWgmma, 48>>;

template <class Element>
using LoraWgmmaClusterVariants =
    VariantList<LoraWgmmaVariant<Element, LoraRole::kForward, LoraTile::kWgmma, 16, kWgmmaCluster>,
                LoraWgmmaVariant<Element, LoraRole::kForward, LoraTile::kWgmma, 48, kWgmmaCluster>>;

template <class Element>
using AllLoraWgmmaVariants = Concat<LoraWgmmaVariants<Element, LoraRole::kForward>,
                                    LoraWgmmaVariants<Element, LoraRole::kGradX>, LoraWgmmaClusterVariants<Element>>;

}  // namespace lk
