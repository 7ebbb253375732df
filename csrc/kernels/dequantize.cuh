// Packed weights as a matrix of weights.
#pragma once

#include "../config/dequantize.h"
#include "../formats/codes4.h"
#include "../params/dequantize.h"
#include "prompt_rows.cuh"

namespace lk {

template <class Element_, bool kAligned_>
struct DequantizeCodes4;

// A warp has kWarpWeights neighbours, and its own part of shared memory: no barrier is the block's.
//
// Their packed bytes come as they lie, 16 for a lane. Of these a lane cannot decode its own: the 16-byte stores of a
// warp's lanes, which together fill whole lines, then hold weights of two or four packed bytes each. Shared memory
// hands the bytes on: they are copied there without a register, and a lane reads the word that holds its next weights,
// lanes beside each other in banks beside each other. Shuffles would take four, and sixteen selects, for what is one
// load here.
template <class Element_>
struct DequantizeCodes4<Element_, true> {
  using Element = Element_;
  static constexpr int kThreads = kDequantizeThreads, kMinBlocks = 8;

  LK_DEVICE static void run(const DequantizeParams& p) {
    const Codes4Weight& w = p.weight;
    const int64_t warp = static_cast<int64_t>(block_index()) * kWarps + warp_index(), first = warp * kWarpWeights;
    if (first >= w.count) return;
    const uint32_t lane = lane_index(), block_bits = count_ones(static_cast<uint32_t>(w.block - 1));
    const int count = static_cast<int>(w.count - first < kWarpWeights ? w.count - first : kWarpWeights);
    const uint32_t packed_smem = dynamic_shared() + warp_index() * kWarpBytes, scales_smem = packed_smem + kPackedBytes,
                   codes_smem = scales_smem + kScalesBytes;
    copy_packed(packed_smem, w.data + first / kByteWeights, count / kByteWeights);
    store_scales(scales_smem, w, first >> block_bits, ((count - 1) >> block_bits) + 1);
    if (lane < Codes4::kCodes) store_shared_4(codes_smem + lane * 4, bits_of(load_global(w.code + lane)));
    copy_async_wait<0>();
    sync_warp();
    Bits* const out = static_cast<Bits*>(p.out) + first + lane * kGroup;
    LK_UNROLL
    for (int step = 0; step < kWarpWeights / (kWarp * kGroup); ++step) {
      const uint32_t i = (step * kWarp + lane) * kGroup;
      if (i >= static_cast<uint32_t>(count)) return;
      const uint32_t word = load_shared_4(packed_smem + (step * kWarp + lane) / kSharers * 4) >> lane % kSharers * 16;
      const float scale = float_of(load_shared_4(scales_smem + (i >> block_bits) * 4));
      float f[kGroup];
      LK_UNROLL
      for (int j = 0; j < kGroup; ++j) f[j] = Codes4::code(codes_smem, word, j) * scale;
      Elements<Element>::store(out + step * kWarp * kGroup, f);
    }
  }

 private:
  using Bits = typename Elements<Element>::Bits;
  static constexpr int kGroup = kChunkBytes / sizeof(Bits);       // weights of one store
  static constexpr int kSharers = Codes4::kWordWeights / kGroup;  // lanes that have a word, each its part of 16 bits
  static_assert(kSharers == 1 || kSharers == 2);
  static constexpr int kByteWeights = 8 / Codes4::kBits, kWarps = kThreads / kWarp;
  static constexpr int kPackedBytes = kWarpWeights / kByteWeights;
  static constexpr int kScalesBytes = kWarpWeights / kLeastWholeBlock * sizeof(float);
  static constexpr int kWarpBytes = kPackedBytes + kScalesBytes + Codes4::kTableBytes;
  static_assert(kWarpBytes % Codes4::kTableBytes == 0 && (kPackedBytes + kScalesBytes) % Codes4::kTableBytes == 0,
                "every warp's table begins at a multiple of its size");

  LK_DEVICE static void copy_packed(uint32_t smem, const uint8_t* gmem, int bytes) {
    LK_UNROLL
    for (int j = 0; j < kPackedBytes / (kWarp * kChunkBytes); ++j) {
      const int i = (j * kWarp + lane_index()) * kChunkBytes;
      if (i < bytes) copy_async_16(smem + i, gmem + i, kChunkBytes);
    }
    copy_async_commit();
  }

  LK_DEVICE static void store_scales(uint32_t smem, const Codes4Weight& w, int64_t first, int count) {
    LK_NO_UNROLL
    for (int i = lane_index(); i < count; i += kWarp)
      store_shared_4(smem + i * 4, bits_of(Codes4::scale(w, first + i)));
  }

 public:
  static constexpr int kSharedBytes = kWarps * kWarpBytes;
};

// Any even block, at any address: a thread has one byte.
template <class Element_>
struct DequantizeCodes4<Element_, false> {
  using Element = Element_;
  static constexpr int kThreads = kDequantizeThreads, kMinBlocks = 8, kSharedBytes = 0;

  LK_DEVICE static void run(const DequantizeParams& p) {
    const Codes4Weight& w = p.weight;
    const int64_t i = 2 * (static_cast<int64_t>(block_index()) * kThreads + thread_index());
    if (i >= w.count) return;
    const float scale = Codes4::scale(w, i / w.block);
    const uint8_t byte = load_global(w.data + i / 2);
    for (int j = 0; j < 2; ++j) {
      const float f[1] = {Codes4::code(w, byte, j != 0) * scale};
      Elements<Element>::store(static_cast<typename Elements<Element>::Bits*>(p.out) + i + j, f);
    }
  }
};

template <class Variant>
LK_KERNEL(Variant::kThreads, Variant::kMinBlocks)
dequantize_kernel(const DequantizeParams p) {
  Variant::run(p);
}

}  // namespace lk
