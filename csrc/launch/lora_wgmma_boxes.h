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

inline std::array<Boxes, 5> wgmma_boxes(const LoraLinearParams& p, LoraTile tile) {
  const TileShape shape = tile_shape(tile);
  constexpr int kStoredRows = 64;  // of a warpgroup
  return {{{"x", p.x, p.m, p.k, p.x_stride, shape.rows, &LoraWgmmaParams::x, "rows of the tile, 64 of the depth"},
           {"w", p.w, p.n, p.k, p.w_stride, shape.columns, &LoraWgmmaParams::w, "columns of the tile"},
           {"s", p.s, p.m, p.rank, p.rank, shape.rows, &LoraWgmmaParams::s, "in the place of x, 64 ranks"},
           {"b", p.b, p.n, p.rank, p.b_stride, shape.columns, &LoraWgmmaParams::b, "in the place of w"},
           {"y", p.y, p.m, p.n, p.y_stride, kStoredRows, &LoraWgmmaParams::y, "stored 64 x 64 by each warpgroup"}}};
}

// The Params of a launch. encode(map, boxes) is false where the driver refuses.
template <class Encode>
bool with_maps(LoraWgmmaParams& params, LoraTile tile, const Encode& encode) {
  for (const Boxes& boxes : wgmma_boxes(params.lora, tile)) {
    if (!encode(params.*boxes.map, boxes)) return false;
  }
  return true;
}

}  // namespace lk
