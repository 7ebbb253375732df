// The matrices of a launch of schedule "wgmma" as the copy engine of sm_90 takes them: once, for the launch, the plan
// and the tests' emulator. No torch, no CUDA.
#pragma once

#include <array>
#include <cstdint>

#include "../config/lora_linear.h"
#include "../params/lora_linear_wgmma.h"

namespace lk {

// A matrix of 16-bit elements and the boxes that are copied of it. A row of a box is 128 bytes, swizzled.
struct Boxes {
  const char* tensor;
  const void* data;
  int64_t rows, columns, stride;  // elements
  int box_rows;
  TensorMap LoraWgmmaParams::*map;
  const char* why;

  static constexpr int kColumns = 64, kSwizzleBytes = 128, kElementBytes = 2;
};

inline std::array<Boxes, 5> wgmma_boxes(const LoraLinearParams& p, const LoraKey& key) {
  const TileShape tile = tile_shape(key.tile);
  constexpr int kDepth = 64, kStoredRows = 64;  // of a warpgroup
  const Boxes x{"x", p.x, p.m, p.k, p.x_stride, tile.rows, &LoraWgmmaParams::x, "rows of the tile, 64 of the depth"};
  const Boxes s{"s", p.s, p.m, p.rank, p.rank, tile.rows, &LoraWgmmaParams::s, "in the place of x, 64 ranks"};
  const Boxes y{"y", p.y, p.m, p.n, p.y_stride, kStoredRows, &LoraWgmmaParams::y, "stored 64 x 64 by each warpgroup"};
  if (key.role == LoraRole::kGradX) {
    const char* const panels = "as it lies, 64 of the depth in panels of 64 columns of the tile";
    return {{x,
             {"w", p.w, p.k, p.n, p.w_stride, kDepth, &LoraWgmmaParams::w, panels},
             s,
             {"b", p.b, p.rank, p.n, p.b_stride, kDepth, &LoraWgmmaParams::b, "in the place of w"},
             y}};
  }
  return {{x,
           {"w", p.w, p.n, p.k, p.w_stride, tile.columns, &LoraWgmmaParams::w, "columns of the tile"},
           s,
           {"b", p.b, p.n, p.rank, p.b_stride, tile.columns, &LoraWgmmaParams::b, "in the place of w"},
           y}};
}

// The Params of a launch. encode(map, boxes) is false where the driver refuses.
template <class Encode>
bool with_maps(LoraWgmmaParams& params, const LoraKey& key, const Encode& encode) {
  for (const Boxes& boxes : wgmma_boxes(params.lora, key)) {
    if (!encode(params.*boxes.map, boxes)) return false;
  }
  return true;
}

}  // namespace lk
