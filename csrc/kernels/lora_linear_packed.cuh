// Few rows by a packed weight, and the branch, in one launch: schedule "decode" of lora_linear_packed.
//
// Reading the weight is all that counts, so that it is streamed packed, once, and decoded in registers. A block has 16
// rows of the weight, and its warps share out the depth. As the first operand of mma.m16n8k16 they have 16 rows to 8 of
// x: a row of x alone makes an eighth of the products useful, which tensor cores have to spare. Products sum over the
// depth in any order, as long as both operands have the same: a lane's 16 neighbours of a row, in memory eight bytes,
// are its elements of four products.
//
// s is computed by blocks with the first tickets, which wait for nobody: 16 ranks are a tile like 16 rows of the
// weight, but the depth is split, so that no block has more to read than another one. The others look for s when all of
// their products are done.
#pragma once

#include "../config/lora_linear_packed.h"
#include "../formats/codes4.h"
#include "../params/lora_linear_packed.h"
#include "between_blocks.cuh"
#include "prompt_rows.cuh"

namespace lk {

template <class Element_, int kRowTile_>
struct LoraLinearPacked {
  using Element = Element_;
  static constexpr int kThreads = kPackedThreads, kMinBlocks = 2;

  LK_DEVICE static void run(const LoraLinearPackedParams& p) {
    const uint32_t smem = dynamic_shared();
    const int tiles_of_s = ceil_div(p.rank, kTile);
    acquire_work(p.counters, smem + kWorkOffset, [&](int ticket) {
      const int base = ticket - tiles_of_s * p.parts;
      return base < 0 ? WorkItem{true, ticket % p.parts, ticket / p.parts} : WorkItem{false, 0, base};
    });
    const WorkItem work = current_work(smem + kWorkOffset);
    if (work.is_shrink) {
      shrink(p, smem, work.column, work.row);
    } else {
      base(p, smem, work.column, tiles_of_s);
    }
  }

 private:
  using Bits = typename Elements<Element>::Bits;
  static constexpr int kTile = kPackedTile, kRowTile = kRowTile_, kGroups = kRowTile / 8;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kStageSteps = 4, kStages = 2;    // of a warp
  static constexpr int kAhead = kStageSteps / kGroups;  // steps whose x is loaded before the first is multiplied
  static constexpr int kStageRowBytes = kStageSteps * kPackedStep / 2;  // 128: all banks
  static constexpr int kStageChunks = kStageRowBytes / kChunkBytes;
  static constexpr int kStageBytes = kTile * kStageRowBytes;
  static constexpr int kScalesBytes = kTile * kStageSteps * static_cast<int>(sizeof(float));
  static constexpr int kWarpBytes = kStages * kStageBytes + kScalesBytes;
  static constexpr int kSumsOffset = kWarps * kWarpBytes, kSums = kTile * kRowTile;  // a value of y, or s, per thread
  static constexpr int kWorkOffset = kSumsOffset + kWarps * kSums * static_cast<int>(sizeof(float));
  static constexpr int kDone = 1, kFirstArrival = 2;  // counters

  using Accumulator = float[kGroups][4];
  // A lane's 16 neighbours of a row, as pairs.
  using Neighbours = uint32_t[8];

  // ---- operands

  // Which row of 8 a lane has, and where its neighbours of a step begin.
  LK_DEVICE static int lane_row() { return lane_index() / 4; }
  LK_DEVICE static int lane_depth() { return lane_index() % 4 * (kPackedStep / 4); }

  LK_DEVICE static void load(const Bits* source, bool exists, Neighbours& to) {
    LK_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Vec16 v = exists ? load_global(reinterpret_cast<const Vec16*>(source) + half) : Vec16{};
      LK_UNROLL
      for (int i = 0; i < 4; ++i) to[half * 4 + i] = v.word[i];
    }
  }

  // Of an fp32 adapter.
  LK_DEVICE static void load(const float* source, bool exists, Neighbours& to) {
    LK_UNROLL
    for (int quarter = 0; quarter < 4; ++quarter) {
      const Vec16 v = exists ? load_global(reinterpret_cast<const Vec16*>(source) + quarter) : Vec16{};
      to[quarter * 2] = Element::pack(float_of(v.word[0]), float_of(v.word[1]));
      to[quarter * 2 + 1] = Element::pack(float_of(v.word[2]), float_of(v.word[3]));
    }
  }

  LK_DEVICE static void load_x(const LoraLinearPackedParams& p, int k, Neighbours (&x)[kGroups]) {
    LK_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      const int row = group * 8 + lane_row();
      load(static_cast<const Bits*>(p.x) + row * p.x_stride + k + lane_depth(), row < p.m, x[group]);
    }
  }

  // d += the products of a step: rows lane_row() and 8 below of the first operand.
  LK_DEVICE static void multiply(const Neighbours& upper, const Neighbours& lower, const Neighbours (&x)[kGroups],
                                 Accumulator& d) {
    LK_UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint32_t a[4] = {upper[2 * i], lower[2 * i], upper[2 * i + 1], lower[2 * i + 1]};
      LK_UNROLL
      for (int group = 0; group < kGroups; ++group)
        Element::multiply_add(d[group], a, x[group][2 * i], x[group][2 * i + 1]);
    }
  }

  // ---- sums over the block's warps

  // This thread's value of the tile: element (row_of_thread(), thread_index() % kTile) of [kRowTile, kTile].
  LK_DEVICE static int row_of_thread() { return thread_index() / kTile; }
  LK_DEVICE static int column_of_thread() { return thread_index() % kTile; }

  LK_DEVICE static float sum_over_warps(uint32_t smem, const Accumulator& acc) {
    const uint32_t sums = smem + kSumsOffset;
    LK_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      LK_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int row = group * 8 + FragmentC::column(lane_index()) + i % 2;
        const int column = FragmentC::row(lane_index()) + i / 2 * 8;
        store_shared_4(sums + (warp_index() * kSums + place(row, column)) * 4, bits_of(acc[group][i]));
      }
    }
    sync_block();
    float sum = 0.0f;
    if (row_of_thread() >= kRowTile) return sum;
    LK_UNROLL
    for (int warp = 0; warp < kWarps; ++warp) {
      sum += float_of(load_shared_4(sums + (warp * kSums + place(row_of_thread(), column_of_thread())) * 4));
    }
    return sum;
  }

  // Two rows of 16 share the 32 banks. A warp stores halves of four rows that are two apart, and reads two neighbours.
  LK_DEVICE static int place(int row, int column) {
    return (row ^ (row >> 2 & 1)) * kTile + (column ^ (row >> 1 & 1) << 3);
  }

  // ---- s

  LK_DEVICE static void shrink(const LoraLinearPackedParams& p, uint32_t smem, int tile, int part) {
    Accumulator acc = {};
    if (p.adapter_type == FloatType::kFloat32) {
      shrink_steps(p, static_cast<const float*>(p.a), tile, part, acc);
    } else {
      shrink_steps(p, static_cast<const Bits*>(p.a), tile, part, acc);
    }
    const float sum = sum_over_warps(smem, acc);
    float* const partials = p.partials + static_cast<int64_t>(tile) * p.parts * kSums;
    if (thread_index() < kSums) store_global(partials + part * kSums + thread_index(), sum);
    if (!arrive_last(p.counters + kFirstArrival + tile, p.parts, smem + kWorkOffset)) return;
    const int row = row_of_thread(), rank = tile * kTile + column_of_thread();
    if (row < p.m && rank < p.rank) {
      float total[1] = {0.0f};
      for (int i = 0; i < p.parts; ++i) total[0] += load_global(partials + i * kSums + thread_index());
      Elements<Element>::store(static_cast<Bits*>(p.s) + row * p.rank + rank, total);
    }
    sync_block();
    if (thread_index() == 0) atomic_add_acquire_release(p.counters + kDone, 1);
  }

  template <class Adapter>
  LK_DEVICE static void shrink_steps(const LoraLinearPackedParams& p, const Adapter* a, int tile, int part,
                                     Accumulator& acc) {
    const int steps = p.k / kPackedStep, upper_row = tile * kTile + lane_row(), lower_row = upper_row + 8;
    LK_NO_UNROLL
    for (int step = part * kWarps + warp_index(); step < steps; step += p.parts * kWarps) {
      const int k = step * kPackedStep;
      Neighbours x[kGroups], upper, lower;
      load_x(p, k, x);
      load(a + upper_row * p.a_stride + k + lane_depth(), upper_row < p.rank, upper);
      load(a + lower_row * p.a_stride + k + lane_depth(), lower_row < p.rank, lower);
      multiply(upper, lower, x, acc);
    }
  }

  // ---- y

  LK_DEVICE static void base(const LoraLinearPackedParams& p, uint32_t smem, int tile, int tiles_of_s) {
    Accumulator acc = {};
    base_steps(p, smem + warp_index() * kWarpBytes, tile * kTile, acc);
    const float product = sum_over_warps(smem, acc);
    if (thread_index() == 0) {
      while (load_acquire(p.counters + kDone) < static_cast<uint32_t>(tiles_of_s)) pause();
    }
    sync_block();
    const int row = row_of_thread(), n = tile * kTile + column_of_thread();
    if (row >= p.m || n >= p.n) return;
    float y[1] = {product};
    if (p.bias != nullptr) y[0] += Element::low(load_global(static_cast<const Bits*>(p.bias) + n));
    const Bits* const s = static_cast<const Bits*>(p.s) + row * p.rank;
    float branch = 0.0f;
    for (int r = 0; r < p.rank; ++r) branch += Element::low(load_global(s + r)) * b_at(p, n, r);
    y[0] += p.scaling * branch;
    Elements<Element>::store(static_cast<Bits*>(p.y) + static_cast<int64_t>(row) * p.n + n, y);
  }

  LK_DEVICE static float b_at(const LoraLinearPackedParams& p, int n, int rank) {
    const int64_t i = n * p.b_stride + rank;
    if (p.adapter_type != FloatType::kFloat32) return Element::low(load_global(static_cast<const Bits*>(p.b) + i));
    return Element::low(Element::pack(load_global(static_cast<const float*>(p.b) + i), 0.0f));
  }

  // Stages of the depth, in turn a warp's: neighbours read neighbouring bytes of a row at a time.
  LK_DEVICE static void base_steps(const LoraLinearPackedParams& p, uint32_t smem, int row0, Accumulator& acc) {
    const uint32_t scales_smem = smem + kStages * kStageBytes;
    const CodePlanes<Element> codes(p.weight.code);
    const int stages = ceil_div(p.k, kStageSteps * kPackedStep);
    LK_UNROLL
    for (int i = 0; i < kStages; ++i) {
      const int stage = warp_index() + i * kWarps;
      if (stage < stages) copy_stage(p, smem + i * kStageBytes, row0, stage);
      copy_async_commit();
    }
    int slot = 0;
    LK_NO_UNROLL
    for (int stage = warp_index(); stage < stages; stage += kWarps) {
      const int k0 = stage * kStageSteps * kPackedStep;
      store_scales(p, scales_smem, row0, k0);
      LK_UNROLL
      for (int first = 0; first < kStageSteps; first += kAhead) {
        Neighbours x[kAhead][kGroups];
        LK_UNROLL
        for (int i = 0; i < kAhead; ++i) {
          const int k = k0 + (first + i) * kPackedStep;
          if (k < p.k) load_x(p, k, x[i]);
        }
        if (first == 0) {
          copy_async_wait<kStages - 1>();
          sync_warp();
        }
        LK_UNROLL
        for (int i = 0; i < kAhead; ++i) {
          if (k0 + (first + i) * kPackedStep < p.k) {
            multiply_step(codes, smem + slot * kStageBytes, scales_smem, first + i, x[i], acc);
          }
        }
      }
      sync_warp();
      const int next = stage + kStages * kWarps;
      if (next < stages) copy_stage(p, smem + slot * kStageBytes, row0, next);
      copy_async_commit();
      slot = (slot + 1) % kStages;
    }
  }

  LK_DEVICE static void multiply_step(const CodePlanes<Element>& codes, uint32_t stage_smem, uint32_t scales_smem,
                                      int step, const Neighbours (&x)[kGroups], Accumulator& acc) {
    Accumulator products = {};
    Neighbours upper, lower;
    decode(codes, stage_smem, lane_row(), step, upper);
    decode(codes, stage_smem, lane_row() + 8, step, lower);
    multiply(upper, lower, x, products);
    LK_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float scale = float_of(load_shared_4(scales_smem + ((lane_row() + half * 8) * kStageSteps + step) * 4));
      LK_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        acc[group][half * 2] += scale * products[group][half * 2];
        acc[group][half * 2 + 1] += scale * products[group][half * 2 + 1];
      }
    }
  }

  // Where a row's bytes of a stage lie. A row fills all banks; eight bytes of four rows are read together, and every
  // row has its own pair of chunks for the same step.
  LK_DEVICE static uint32_t offset(int row, int chunk) {
    return static_cast<uint32_t>(row * kStageRowBytes + (chunk ^ (row % 4 * 2)) * kChunkBytes);
  }

  LK_DEVICE static void copy_stage(const LoraLinearPackedParams& p, uint32_t smem, int row0, int stage) {
    LK_UNROLL
    for (int i = 0; i < kTile * kStageChunks / kWarp; ++i) {
      const int index = i * kWarp + lane_index(), row = index / kStageChunks, chunk = index % kStageChunks;
      const int byte = stage * kStageRowBytes + chunk * kChunkBytes;
      const bool exists = row0 + row < p.n && byte < p.k / 2;
      const uint8_t* const source = p.weight.data + static_cast<int64_t>(row0 + row) * (p.k / 2) + byte;
      copy_async_16(smem + offset(row, chunk), exists ? source : p.weight.data, exists ? kChunkBytes : 0);
    }
  }

  LK_DEVICE static void store_scales(const LoraLinearPackedParams& p, uint32_t smem, int row0, int k0) {
    const uint32_t block_bits = count_ones(static_cast<uint32_t>(p.weight.block - 1));
    LK_UNROLL
    for (int i = lane_index(); i < kTile * kStageSteps; i += kWarp) {
      const int row = row0 + i / kStageSteps, k = k0 + i % kStageSteps * kPackedStep;
      if (row < p.n && k < p.k) {
        const int64_t block = (static_cast<int64_t>(row) * p.k + k) >> block_bits;
        store_shared_4(smem + i * 4, bits_of(Codes4::scale(p.weight, block)));
      }
    }
  }

  LK_DEVICE static void decode(const CodePlanes<Element>& codes, uint32_t smem, int row, int step, Neighbours& to) {
    const int lane = lane_index() % 4, chunk = step * 2 + lane / 2;
    const uint64_t packed = load_shared_8(smem + offset(row, chunk) + lane % 2 * 8);
    uint32_t pairs[4];
    LK_UNROLL
    for (int half = 0; half < 2; ++half) {
      codes.decode(static_cast<uint32_t>(packed >> (32 * half)), pairs);
      LK_UNROLL
      for (int i = 0; i < 4; ++i) to[half * 4 + i] = pairs[i];
    }
  }

 public:
  static constexpr int kSharedBytes = kWorkOffset + kBytesWork;
};

// Of a kernel: the type of x, and the rows of x that it has room for.
struct PackedKey {
  FloatType type;
  int row_tile;

  friend constexpr bool operator==(const PackedKey&, const PackedKey&) = default;
};

using LoraLinearPackedVariants =
    VariantList<Variant<PackedKey{FloatType::kBFloat16, 8}, LoraLinearPacked<BFloat16, 8>>,
                Variant<PackedKey{FloatType::kBFloat16, 16}, LoraLinearPacked<BFloat16, 16>>,
                Variant<PackedKey{FloatType::kFloat16, 8}, LoraLinearPacked<Float16, 8>>,
                Variant<PackedKey{FloatType::kFloat16, 16}, LoraLinearPacked<Float16, 16>>>;

template <class Variant>
LK_KERNEL(Variant::kThreads, Variant::kMinBlocks)
lora_linear_packed_kernel(const LoraLinearPackedParams p) {
  Variant::run(p);
}

}  // namespace lk
