// The matrices of a launch of schedule "wgmma" as the copy engine of sm_90 takes them: once, for the launch, the plan
// and the tests' emulator. No torch, no CUDA.
#pragma once

#include <cstdint>
#include <vector>

#include "../config/lora_linear.h"
#include "../params/lora_linear_wgmma.h"

namespace lk {

// A matrix of 16-bit elements and the boxes that are copied of it. A row of a box is 128 or 32 bytes, swizzled.
struct Boxes {
  const char* tensor;
  const void* data;
  int64_t rows, columns, stride;  // elements
  int box_rows;
  TensorMap LoraWgmmaParams::*map;
  const char* why;
  int box_columns = 64;

  static constexpr int kElementBytes = 2;
  int swizzle_bytes() const { return box_columns * kElementBytes; }
};

inline std::vector<Boxes> wgmma_boxes(const LoraLinearParams& p, const LoraKey& key) {
  const TileShape tile = tile_shape(key.tile);
  constexpr int kDepth = 64, kStoredRows = 64;  // of a warpgroup
  const Boxes x{"x", p.x, p.m, p.k, p.x_stride, tile.rows, &LoraWgmmaParams::x, "rows of the tile, 64 of the depth"};
  const Boxes s{"s", p.s, p.m, p.rank, p.rank, tile.rows, &LoraWgmmaParams::s, "in the place of x, 64 ranks"};
  const Boxes y{"y", p.y, p.m, p.n, p.y_stride, kStoredRows, &LoraWgmmaParams::y, "stored 64 x 64 by each warpgroup"};
  if (key.role == LoraRole::kGradX) {
    const char* const panels = "as it lies, 64 of the depth in panels of 64 columns of the tile";
    const int ranks = key.rank_tile == 16 ? 16 : 64;
    std::vector<Boxes> boxes{
        x,
        {"w", p.w, p.k, p.n, p.w_stride, kDepth, &LoraWgmmaParams::w, panels},
        {"a", p.a, p.k, p.rank, p.a_stride, kDepth, &LoraWgmmaParams::a, "in tiles of s', in the place of w", ranks},
        s,
        {"b", p.b, p.rank, p.n, p.b_stride, kDepth, &LoraWgmmaParams::b, "in the place of w"},
        y};
    if (p.partial_grad_b != nullptr) {
      boxes.push_back({"saved s", p.saved_s, p.m, p.rank, p.rank, tile.rows, &LoraWgmmaParams::saved_s,
                       "for parts of dB, once in a tile of s'", ranks});
    }
    return boxes;
  }
  const int columns = tile.columns / key.cluster;  // which one block copies, to all of its cluster
  const char* const of_tile = key.cluster == 1 ? "columns of the tile" : "half of the tile's columns, to both blocks";
  return {x,
          {"w", p.w, p.n, p.k, p.w_stride, columns, &LoraWgmmaParams::w, of_tile},
          s,
          {"b", p.b, p.n, p.rank, p.b_stride, columns, &LoraWgmmaParams::b, "in the place of w"},
          y};
}

// Params without maps. Adapters of fp32 are rounded into p.partials.
inline LoraWgmmaParams wgmma_params(const LoraLinearParams& p, const LoraKey& key) {
  LoraWgmmaParams params{};
  LoraLinearParams& lora = params.lora = p;
  if (!p.adapters_are_float) return params;
  auto* to = reinterpret_cast<uint16_t*>(p.partials);
  const auto rounded = [&](const void*& factor, int64_t& stride, int32_t rows, int32_t columns) {
    const RoundedMatrix matrix{static_cast<const float*>(factor), to, stride, rows, columns};
    factor = to;
    stride = columns;
    to += static_cast<int64_t>(rows) * columns;
    return matrix;
  };
  const bool is_grad_x = key.role == LoraRole::kGradX;
  params.rounded_a = rounded(lora.a, lora.a_stride, is_grad_x ? p.k : p.rank, is_grad_x ? p.rank : p.k);
  params.rounded_b = rounded(lora.b, lora.b_stride, is_grad_x ? p.rank : p.n, is_grad_x ? p.n : p.rank);
  lora.adapters_are_float = false;
  return params;
}

// Their maps. encode(map, boxes) is false where the driver refuses.
template <class Encode>
bool with_maps(LoraWgmmaParams& params, const LoraKey& key, const Encode& encode) {
  for (const Boxes& boxes : wgmma_boxes(params.lora, key)) {
    if (!encode(params.*boxes.map, boxes)) return false;
  }
  return true;
}

}  // namespace lk
