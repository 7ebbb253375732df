// Few rows by a packed weight, and the branch, in one launch: schedule "decode" of lora_linear_packed.
//
// Reading the weight is all that counts, so that it is streamed packed and decoded in registers, once for a tile of
// rows of x. A block has 16 or 32 rows of the weight, and its warps share out the depth. As the first operand of
// mma.m16n8k16 they have 16 rows to 8 of x: a row of x alone makes an eighth of the products useful, which tensor cores
// have to spare. Products sum over the depth in any order, as long as both operands have the same: a lane's 16
// neighbours of a row, in memory eight bytes, are its elements of four products.
//
// s is computed by blocks with the first tickets, which wait for nobody: 16 ranks are a tile like 16 rows of the
// weight, but the depth is split, so that no block has more to read than another one. The others look for s when all of
// their products are done.
#pragma once

#include "../config/lora_linear_packed.h"
#include "../formats/codes4.h"
#include "../params/lora_linear_packed.h"
#include "between_blocks.cuh"
#include "rows.cuh"

namespace lk {

template <class Element_, int kRowTile_>
struct LoraLinearPacked {
  using Element = Element_;
  static constexpr int kThreads = kPackedThreads, kMinBlocks = 2;

  LK_DEVICE static void run(const LoraLinearPackedParams& p) {
    const uint32_t smem = dynamic_shared();
    acquire_work(p.counters, smem + kWorkOffset, [&](int ticket) {
      const int base = ticket - tiles_of_s(p) * p.parts;
      return base < 0 ? WorkItem{true, ticket / p.parts, ticket % p.parts}
                      : WorkItem{false, base % row_tiles(p), base / row_tiles(p)};
    });
    const WorkItem work = current_work(smem + kWorkOffset);
    if (work.is_shrink) {
      shrink(p, smem, work.row, work.column);
    } else {
      base(p, smem, work.row * kRowTile, work.column * kTile);
    }
  }

 private:
  using Bits = typename Elements<Element>::Bits;
  static constexpr int kRowTile = kRowTile_, kGroups = kRowTile / 8;
  static constexpr int kTile = packed_tile(kRowTile), kFragmentRows = 16, kFragments = kTile / kFragmentRows;
  static_assert(kPackedRanks == kFragmentRows);
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kStageSteps = 4, kStages = 2;    // of a warp
  static constexpr int kAhead = kStageSteps / kGroups;  // steps whose x is loaded before the first is multiplied
  static constexpr int kStageRowBytes = kStageSteps * kPackedStep / 2;  // 128: all banks
  static constexpr int kStageChunks = kStageRowBytes / kChunkBytes;
  static constexpr int kStageBytes = kTile * kStageRowBytes;
  static constexpr int kScalesBytes = kTile * kStageSteps * static_cast<int>(sizeof(float));
  static constexpr int kWarpBytes = kStages * kStageBytes + kScalesBytes;
  static constexpr int kWorkOffset = kWarps * kWarpBytes;
  static constexpr int kDone = 1, kFirstArrival = 2;  // counters

  using Accumulator = float[kGroups][4];  // of 16 rows of the weight, or ranks
  // A lane's 16 neighbours of a row, as pairs.
  using Neighbours = uint32_t[8];

  LK_DEVICE static int row_tiles(const LoraLinearPackedParams& p) { return ceil_div(p.m, kRowTile); }
  LK_DEVICE static int tiles_of_s(const LoraLinearPackedParams& p) {
    return ceil_div(p.rank, kFragmentRows) * row_tiles(p);
  }

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

  LK_DEVICE static void load_x(const LoraLinearPackedParams& p, int row0, int k, Neighbours (&x)[kGroups]) {
    const int row = row0 + lane_row();
    const Bits* source = static_cast<const Bits*>(p.x) + row * p.x_stride + k + lane_depth();
    LK_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      load(source, row + group * 8 < p.m, x[group]);
      source += 8 * p.x_stride;
    }
  }

  // d += products of a step: rows lane_row() and 8 below of the first operand, whose pairs are x's from `first` on.
  template <int kPairs>
  LK_DEVICE static void multiply(const uint32_t (&upper)[kPairs], const uint32_t (&lower)[kPairs],
                                 const Neighbours (&x)[kGroups], int first, Accumulator& d) {
    LK_UNROLL
    for (int i = 0; i < kPairs; i += 2) {
      const uint32_t a[4] = {upper[i], lower[i], upper[i + 1], lower[i + 1]};
      LK_UNROLL
      for (int group = 0; group < kGroups; ++group)
        Element::multiply_add(d[group], a, x[group][first + i], x[group][first + i + 1]);
    }
  }

  // ---- sums over the block's warps

  // Of a tile [kRowTile, kColumns] of sums, counted row by row, a thread has every kThreads-th.
  template <int kColumns>
  static constexpr int kValues = (kRowTile * kColumns + kThreads - 1) / kThreads;

  // f(value number, row, column) for the values of this thread.
  template <int kColumns, class F>
  LK_DEVICE static void for_values(const F& f) {
    LK_UNROLL
    for (int i = 0; i < kValues<kColumns>; ++i) {
      const int value = i * kThreads + thread_index();
      if (value < kRowTile * kColumns) f(i, value / kColumns, value % kColumns);
    }
  }

  // In the memory of the stages, which no warp needs then.
  template <int kCount>
  LK_DEVICE static void sum_over_warps(uint32_t smem, const Accumulator (&acc)[kCount],
                                       float (&sums)[kValues<kCount * kFragmentRows>]) {
    constexpr int kColumns = kCount * kFragmentRows, kSums = kRowTile * kColumns;
    static_assert(kSums * static_cast<int>(sizeof(float)) <= kWarpBytes);
    sync_block();
    LK_UNROLL
    for (int fragment = 0; fragment < kCount; ++fragment) {
      LK_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        LK_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int row = group * 8 + FragmentC::column(lane_index()) + i % 2;
          const int column = fragment * kFragmentRows + FragmentC::row(lane_index()) + i / 2 * 8;
          store_shared_4(smem + (warp_index() * kSums + place<kColumns>(row, column)) * 4,
                         bits_of(acc[fragment][group][i]));
        }
      }
    }
    sync_block();
    for_values<kColumns>([&](int i, int row, int column) {
      sums[i] = 0.0f;
      LK_UNROLL
      for (int warp = 0; warp < kWarps; ++warp) {
        sums[i] += float_of(load_shared_4(smem + (warp * kSums + place<kColumns>(row, column)) * 4));
      }
    });
  }

  // A warp stores eight neighbours in each of four rows that are two apart, and reads neighbouring rows. A row of 32
  // has all banks, so that its neighbours by eight are moved; rows of 16 share them in pairs, too.
  template <int kColumns>
  LK_DEVICE static int place(int row, int column) {
    if constexpr (kColumns == 32) return row * kColumns + (column ^ (row >> 1 & 3) << 3);
    return (row ^ (row >> 2 & 1)) * kColumns + (column ^ (row >> 1 & 1) << 3);
  }

  // ---- s

  LK_DEVICE static void shrink(const LoraLinearPackedParams& p, uint32_t smem, int tile, int part) {
    constexpr int kRanks = kFragmentRows, kSums = kRowTile * kRanks;
    const int rank0 = tile / row_tiles(p) * kRanks, row0 = tile % row_tiles(p) * kRowTile;
    Accumulator acc[1] = {};
    if (p.adapter_type == FloatType::kFloat32) {
      shrink_steps(p, static_cast<const float*>(p.a), row0, rank0, part, acc[0]);
    } else {
      shrink_steps(p, static_cast<const Bits*>(p.a), row0, rank0, part, acc[0]);
    }
    float sums[kValues<kRanks>];
    sum_over_warps(smem, acc, sums);
    float* const partials = p.partials + static_cast<int64_t>(tile) * p.parts * kSums;
    for_values<kRanks>(
        [&](int i, int row, int column) { store_global(partials + part * kSums + row * kRanks + column, sums[i]); });
    if (!arrive_last(p.counters + kFirstArrival + tile, p.parts, smem + kWorkOffset)) return;
    for_values<kRanks>([&](int, int row, int column) {
      if (row0 + row >= p.m || rank0 + column >= p.rank) return;
      float total[1] = {0.0f};
      for (int i = 0; i < p.parts; ++i) total[0] += load_global(partials + i * kSums + row * kRanks + column);
      Elements<Element>::store(static_cast<Bits*>(p.s) + (row0 + row) * p.rank + rank0 + column, total);
    });
    sync_block();
    if (thread_index() == 0) atomic_add_acquire_release(p.counters + kDone, 1);
  }

  template <class Adapter>
  LK_DEVICE static void shrink_steps(const LoraLinearPackedParams& p, const Adapter* a, int row0, int rank0, int part,
                                     Accumulator& acc) {
    const int steps = p.k / kPackedStep, upper_row = rank0 + lane_row(), lower_row = upper_row + 8;
    LK_NO_UNROLL
    for (int step = part * kWarps + warp_index(); step < steps; step += p.parts * kWarps) {
      const int k = step * kPackedStep;
      Neighbours x[kGroups], upper, lower;
      load_x(p, row0, k, x);
      load(a + upper_row * p.a_stride + k + lane_depth(), upper_row < p.rank, upper);
      load(a + lower_row * p.a_stride + k + lane_depth(), lower_row < p.rank, lower);
      multiply(upper, lower, x, 0, acc);
    }
  }

  // ---- y

  LK_DEVICE static void base(const LoraLinearPackedParams& p, uint32_t smem, int row0, int n0) {
    Accumulator acc[kFragments] = {};
    base_steps(p, smem + warp_index() * kWarpBytes, row0, n0, acc);
    float products[kValues<kTile>];
    sum_over_warps(smem, acc, products);
    if (thread_index() == 0) {
      while (load_acquire(p.counters + kDone) < static_cast<uint32_t>(tiles_of_s(p))) pause();
    }
    sync_block();
    store(p, current_work(smem + kWorkOffset), products);  // read again: no register has held it over the main loop
  }

  LK_DEVICE static void store(const LoraLinearPackedParams& p, const WorkItem& work,
                              const float (&products)[kValues<kTile>]) {
    static_assert(kThreads % kTile == 0, "a thread's values are all of one column");
    const int row0 = work.row * kRowTile, n = work.column * kTile + thread_index() % kTile;
    if (n >= p.n) return;
    float branch[kValues<kTile>] = {};
    for (int r = 0; r < p.rank; ++r) {
      const float b = b_at(p, n, r);
      for_values<kTile>([&](int i, int row, int) {
        if (row0 + row >= p.m) return;
        branch[i] += Element::low(load_global(static_cast<const Bits*>(p.s) + (row0 + row) * p.rank + r)) * b;
      });
    }
    const float bias = p.bias != nullptr ? Element::low(load_global(static_cast<const Bits*>(p.bias) + n)) : 0.0f;
    for_values<kTile>([&](int i, int row, int) {
      if (row0 + row >= p.m) return;
      const float y[1] = {products[i] + bias + p.scaling * branch[i]};
      Elements<Element>::store(static_cast<Bits*>(p.y) + static_cast<int64_t>(row0 + row) * p.n + n, y);
    });
  }

  LK_DEVICE static float b_at(const LoraLinearPackedParams& p, int n, int rank) {
    const int64_t i = n * p.b_stride + rank;
    if (p.adapter_type != FloatType::kFloat32) return Element::low(load_global(static_cast<const Bits*>(p.b) + i));
    return Element::low(Element::pack(load_global(static_cast<const float*>(p.b) + i), 0.0f));
  }

  // Stages of the depth, in turn a warp's: neighbours read neighbouring bytes of a row at a time.
  LK_DEVICE static void base_steps(const LoraLinearPackedParams& p, uint32_t smem, int row0, int n0,
                                   Accumulator (&acc)[kFragments]) {
    const uint32_t scales_smem = smem + kStages * kStageBytes;
    const CodePlanes<Element> codes(p.weight.code);
    const int stages = ceil_div(p.k, kStageSteps * kPackedStep);
    LK_UNROLL
    for (int i = 0; i < kStages; ++i) {
      const int stage = warp_index() + i * kWarps;
      if (stage < stages) copy_stage(p, smem + i * kStageBytes, n0, stage);
      copy_async_commit();
    }
    int slot = 0;
    LK_NO_UNROLL
    for (int stage = warp_index(); stage < stages; stage += kWarps) {
      const int k0 = stage * kStageSteps * kPackedStep;
      store_scales(p, scales_smem, n0, k0);
      LK_NO_UNROLL
      for (int first = 0; first < kStageSteps; first += kAhead) {
        Neighbours x[kAhead][kGroups];
        LK_UNROLL
        for (int i = 0; i < kAhead; ++i) {
          const int k = k0 + (first + i) * kPackedStep;
          if (k < p.k) load_x(p, row0, k, x[i]);
        }
        if (first == 0) {
          copy_async_wait<kStages - 1>();
          sync_warp();
        }
        LK_UNROLL
        for (int i = 0; i < kAhead; ++i) {
          if (k0 + (first + i) * kPackedStep >= p.k) continue;
          LK_UNROLL
          for (int fragment = 0; fragment < kFragments; ++fragment) {
            multiply_step(codes, smem + slot * kStageBytes, scales_smem, fragment * kFragmentRows, first + i, x[i],
                          acc[fragment]);
          }
        }
      }
      sync_warp();
      const int next = stage + kStages * kWarps;
      if (next < stages) copy_stage(p, smem + slot * kStageBytes, n0, next);
      copy_async_commit();
      slot = (slot + 1) % kStages;
    }
  }

  // Of 16 rows of the weight, from `row` of the tile on.
  LK_DEVICE static void multiply_step(const CodePlanes<Element>& codes, uint32_t stage_smem, uint32_t scales_smem,
                                      int row, int step, const Neighbours (&x)[kGroups], Accumulator& acc) {
    Accumulator products = {};
    const uint64_t upper = packed(stage_smem, row + lane_row(), step),
                   lower = packed(stage_smem, row + lane_row() + 8, step);
    LK_UNROLL
    for (int word = 0; word < 2; ++word) {
      uint32_t upper_pairs[4], lower_pairs[4];
      codes.decode(static_cast<uint32_t>(upper >> (32 * word)), upper_pairs);
      codes.decode(static_cast<uint32_t>(lower >> (32 * word)), lower_pairs);
      multiply(upper_pairs, lower_pairs, x, word * 4, products);
    }
    LK_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int scale_of = (row + lane_row() + half * 8) * kStageSteps + step;
      const float scale = float_of(load_shared_4(scales_smem + scale_of * 4));
      LK_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        acc[group][half * 2] += scale * products[group][half * 2];
        acc[group][half * 2 + 1] += scale * products[group][half * 2 + 1];
      }
    }
  }

  // Where a row's bytes of a stage lie. A row fills all banks; eight bytes of four rows are read together, and every
  // row has its own pair of chunks for the same step.
  static constexpr int kSwizzledRows = 4;
  LK_DEVICE static constexpr uint32_t offset(int row, int chunk) {
    return static_cast<uint32_t>(row * kStageRowBytes + (chunk ^ (row % kSwizzledRows * 2)) * kChunkBytes);
  }

  // A row after the other from one address: addresses of all would be registers over the whole loop of stages.
  LK_DEVICE static void copy_stage(const LoraLinearPackedParams& p, uint32_t smem, int n0, int stage) {
    constexpr int kRows = kWarp / kStageChunks;  // that a warp copies at a time
    const int row = lane_index() / kStageChunks, chunk = lane_index() % kStageChunks, row_bytes = p.k / 2;
    const int byte = stage * kStageRowBytes + chunk * kChunkBytes;
    const int rows = byte < row_bytes ? p.n - n0 - row : 0;  // that exist
    const uint8_t* source = p.weight.data + static_cast<int64_t>(n0 + row) * row_bytes + byte;
    static_assert(kRows % kSwizzledRows == 0);
    smem += offset(row, chunk);
    LK_UNROLL
    for (int i = 0; i < kTile; i += kRows) {
      copy_async_16(smem + i * kStageRowBytes, i < rows ? source : p.weight.data, i < rows ? kChunkBytes : 0);
      source += static_cast<int64_t>(kRows) * row_bytes;
    }
  }

  LK_DEVICE static void store_scales(const LoraLinearPackedParams& p, uint32_t smem, int n0, int k0) {
    constexpr int kRows = kWarp / kStageSteps;
    const uint32_t block_bits = count_ones(static_cast<uint32_t>(p.weight.block - 1));
    const int row = lane_index() / kStageSteps, k = k0 + lane_index() % kStageSteps * kPackedStep;
    const int rows = k < p.k ? p.n - n0 - row : 0;
    int64_t weight = static_cast<int64_t>(n0 + row) * p.k + k;
    LK_UNROLL
    for (int i = 0; i < kTile; i += kRows) {
      if (i < rows) {
        const float scale = codes4_scale(p.weight, weight >> block_bits);
        store_shared_4(smem + (i * kStageSteps + lane_index()) * 4, bits_of(scale));
      }
      weight += static_cast<int64_t>(kRows) * p.k;
    }
  }

  // A lane's neighbours of a row of the tile.
  LK_DEVICE static uint64_t packed(uint32_t smem, int row, int step) {
    static_assert(offset(1, 0) % 128 == 32 && offset(2, 0) % 128 == 64 && offset(3, 0) % 128 == 96,
                  "rows that are read together lie in banks of their own");
    const int lane = lane_index() % 4, chunk = step * 2 + lane / 2;
    return load_shared_8(smem + offset(row, chunk) + lane % 2 * 8);
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
                Variant<PackedKey{FloatType::kBFloat16, 32}, LoraLinearPacked<BFloat16, 32>>,
                Variant<PackedKey{FloatType::kFloat16, 8}, LoraLinearPacked<Float16, 8>>,
                Variant<PackedKey{FloatType::kFloat16, 16}, LoraLinearPacked<Float16, 16>>,
                Variant<PackedKey{FloatType::kFloat16, 32}, LoraLinearPacked<Float16, 32>>>;

template <class Variant>
LK_KERNEL(Variant::kThreads, Variant::kMinBlocks)
lora_linear_packed_kernel(const LoraLinearPackedParams p) {
  Variant::run(p);
}

}  // namespace lk
