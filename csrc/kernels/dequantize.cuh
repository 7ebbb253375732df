// Packed weights as a matrix of weights.
#pragma once

#include "../config/dequantize.h"
#include "../formats/codes4.h"
#include "../formats/scaled.h"
#include "../params/dequantize.h"
#include "rows.cuh"

namespace lk {

// A layout decodes a byte's weights (decode_byte), and by its class Warp, which has some shared memory, the weights of
// a warp from neighbouring bytes.
template <class Layout, class Element_, bool kAligned_>
struct Dequantize;

// The part of a run of weights that a warp or a thread has, `weights` of them at most, and where it goes.
struct Share {
  int64_t run, in_run, first, out;

  LK_DEVICE Share(const WeightRuns& runs, int64_t index, int weights) {
    const int64_t of_run = (runs.length + weights - 1) / weights;
    run = index < of_run ? 0 : index / of_run;  // one run, mostly: nobody waits for a division of 64 bits
    in_run = (index - run * of_run) * weights;
    first = runs.first + run * runs.stride + in_run;
    out = run * runs.length + in_run;
  }
};

// A warp has kWarpPackedBytes neighbours, and its own part of shared memory: no barrier is the block's.
//
// Packed bytes come as they lie, 16 for a lane. Of these a lane cannot decode its own: the 16-byte stores of a warp's
// lanes, which together fill whole lines, then hold weights of two, four or eight packed bytes each. Shared memory
// hands the bytes on: they are copied there without a register, and a lane reads those of its next weights, lanes
// beside each other in banks beside each other. Shuffles would take four, and sixteen selects, for what is one load
// here.
template <class Layout, class Element_>
struct Dequantize<Layout, Element_, true> {
  using Element = Element_;
  static constexpr int kThreads = kDequantizeThreads, kMinBlocks = 8;

  LK_DEVICE static void run(const DequantizeParams& p) {
    const PackedParts& w = p.weight;
    const Share share(p.runs, static_cast<int64_t>(block_index()) * kWarps + warp_index(), kWarpWeights);
    if (share.run >= p.runs.count) return;
    const int64_t first = share.first, left = p.runs.length - share.in_run;
    const uint32_t lane = lane_index(), packed_smem = dynamic_shared() + warp_index() * kWarpBytes;
    const int count = static_cast<int>(left < kWarpWeights ? left : kWarpWeights);
    copy_packed(packed_smem, w.data + first / kByteWeights, count / kByteWeights);
    typename Layout::Warp warp(w, packed_smem + kWarpPackedBytes, first, count);
    copy_async_wait<0>();
    sync_warp();
    Bits* const out = static_cast<Bits*>(p.out) + share.out + lane * kGroup;
    LK_UNROLL
    for (int step = 0; step < kWarpWeights / (kWarp * kGroup); ++step) {
      const uint32_t i = (step * kWarp + lane) * kGroup;
      if (i >= static_cast<uint32_t>(count)) return;
      float f[kGroup];
      warp.decode(load_packed(packed_smem + i / kByteWeights), i, f);
      Elements<Element>::store(out + step * kWarp * kGroup, f);
    }
  }

 private:
  using Bits = typename Elements<Element>::Bits;
  static constexpr int kGroup = kChunkBytes / sizeof(Bits);  // weights of one store
  static_assert(kGroup <= kMostGroup);
  static constexpr int kByteWeights = 8 / Layout::kBits, kGroupBytes = kGroup / kByteWeights;
  static constexpr int kWarps = kThreads / kWarp, kWarpWeights = kWarpPackedBytes * kByteWeights;
  static constexpr uint32_t kWarpBytes = kWarpPackedBytes + Layout::Warp::kSharedBytes;

  LK_DEVICE static void copy_packed(uint32_t smem, const uint8_t* gmem, int bytes) {
    LK_UNROLL
    for (int j = 0; j < kWarpPackedBytes / (kWarp * kChunkBytes); ++j) {
      const int i = (j * kWarp + lane_index()) * kChunkBytes, left = bytes - i;
      if (left > 0) copy_async_16(smem + i, gmem + i, left < kChunkBytes ? left : kChunkBytes);
    }
    copy_async_commit();
  }

  // The bytes of a group, of which two are half of a word that two lanes read.
  LK_DEVICE static uint64_t load_packed(uint32_t smem) {
    if constexpr (kGroupBytes == 8) {
      return load_shared_8(smem);
    } else if constexpr (kGroupBytes == 4) {
      return load_shared_4(smem);
    } else {
      static_assert(kGroupBytes == 2);
      return load_shared_4(smem & ~3u) >> (smem & 2) * 8;
    }
  }

 public:
  static constexpr int kSharedBytes = kWarps * static_cast<int>(kWarpBytes);
};

// Any block, at any address: a thread has one byte.
template <class Layout, class Element_>
struct Dequantize<Layout, Element_, false> {
  using Element = Element_;
  static constexpr int kThreads = kDequantizeThreads, kMinBlocks = 8, kSharedBytes = 0;

  LK_DEVICE static void run(const DequantizeParams& p) {
    constexpr int kByteWeights = 8 / Layout::kBits;
    const Share share(p.runs, static_cast<int64_t>(block_index()) * kThreads + thread_index(), kByteWeights);
    if (share.run >= p.runs.count) return;
    float weights[kByteWeights];
    Layout::decode_byte(p.weight, share.first, weights);
    LK_UNROLL
    for (int j = 0; j < kByteWeights; ++j) {
      const float f[1] = {weights[j]};
      Elements<Element>::store(static_cast<typename Elements<Element>::Bits*>(p.out) + share.out + j, f);
    }
  }
};

struct DequantizeKey {
  PackedLayout layout;
  FloatType type;
  bool aligned;

  friend constexpr bool operator==(const DequantizeKey&, const DequantizeKey&) = default;
};

template <PackedLayout kLayout, class Layout, FloatType kType, class Element>
using DequantizeTo = VariantList<Variant<DequantizeKey{kLayout, kType, true}, Dequantize<Layout, Element, true>>,
                                 Variant<DequantizeKey{kLayout, kType, false}, Dequantize<Layout, Element, false>>>;

template <PackedLayout kLayout, class Layout>
using DequantizeLayout = Concat<DequantizeTo<kLayout, Layout, FloatType::kFloat32, Float32>,
                                DequantizeTo<kLayout, Layout, FloatType::kBFloat16, BFloat16>,
                                DequantizeTo<kLayout, Layout, FloatType::kFloat16, Float16>>;

using DequantizeVariants =
    Concat<DequantizeLayout<PackedLayout::kCodes4, Codes4<false>>,
           DequantizeLayout<PackedLayout::kCodes4Low, Codes4<true>>,
           DequantizeLayout<PackedLayout::kInt8, Scaled<Int8>>, DequantizeLayout<PackedLayout::kE4M3, Scaled<E4M3>>>;

template <class Variant>
LK_KERNEL(Variant::kThreads, Variant::kMinBlocks)
dequantize_kernel(const DequantizeParams p) {
  Variant::run(p);
}

}  // namespace lk
