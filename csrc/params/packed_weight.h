// Weights that are packed, as kernels take them. No torch.
#pragma once

#include <cstdint>

namespace lk {

// Scales that one scale of the second level is for.
constexpr int64_t kScalesPerScale2 = 256;

// [n, k] weights of layout "codes4", counted row by row: weight i is in byte i / 2, an even one in the high half. It is
// code[those four bits] * the scale of block i / block, in fp32. Arrays are contiguous.
struct Codes4Weight {
  const uint8_t* data;
  const void* scales;    // fp32; where there are scales of the scales (scales2 is not null), uint8
  const float* code;     // 16
  const float* scales2;  // one for kScalesPerScale2 scales, which are code2[scales[b]] * scales2[b / that] + offset
  const float* code2;    // 256
  const float* offset;   // 1
  int64_t count, block;  // weights; weights that share a scale: an even number
};

}  // namespace lk
