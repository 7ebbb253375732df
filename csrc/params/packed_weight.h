// Weights that are packed, as kernels take them. No torch.
#pragma once

#include <cstdint>

namespace lk {

// How the parts of a weight lie, and what they stand for: lora_kernels/formats/ defines it.
enum class PackedLayout : int32_t { kCodes4, kCodes4Low, kInt8, kE4M3 };

// As ops are given them.
constexpr struct {
  const char* name;
  PackedLayout layout;
} kPackedLayouts[] = {{"codes4", PackedLayout::kCodes4},
                      {"codes4_low", PackedLayout::kCodes4Low},
                      {"int8", PackedLayout::kInt8},
                      {"e4m3", PackedLayout::kE4M3}};

constexpr bool is_codes4(PackedLayout layout) {
  return layout == PackedLayout::kCodes4 || layout == PackedLayout::kCodes4Low;
}

// Scales that one scale of the second level is for.
constexpr int64_t kScalesPerScale2 = 256;

// The parts of an [n, k] weight, whose numbers are counted row by row. Arrays are contiguous.
//
// "codes4": number i has four bits of byte i / 2, an even one the high half; in "codes4_low", the low one. The weight
// is code[those bits] * the scale of block i / block, in fp32. "int8", "e4m3": number i is byte i. The weight is that
// number * scales[row / block_rows][column / block], in fp32.
struct PackedParts {
  const uint8_t* data;
  const void* scales;    // fp32; where there are scales of the scales (scales2 is not null), uint8
  const float* code;     // codes4: 16
  const float* scales2;  // codes4: one for kScalesPerScale2 scales, code2[scales[b]] * scales2[b / that] + offset
  const float* code2;    // 256
  const float* offset;   // 1
  int32_t n, k;
  int32_t block;          // neighbours of a row that share a scale; codes4: an even number
  int32_t block_rows;     // rows that do
  int32_t block_columns;  // blocks of a row
  PackedLayout layout;
};

}  // namespace lk
