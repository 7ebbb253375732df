// The low-rank branch of a tile of y: acc += scaling · s bᵀ, and the ways to get s.
#pragma once

#include "../formats/float32.h"
#include "../params/lora_linear.h"
#include "dropout.cuh"
#include "store.cuh"

namespace lk {

// fp32 adapters under 16-bit elements are rounded on the way.
template <class Element, bool kAligned>
using RoundedChunk = DecodedChunk<Float32Format<Element>, kAligned>;

// f(Chunk{}) of the adapter: a choice made once, outside of f's loops.
template <class Element, bool kAligned, class F>
LK_DEVICE void with_adapter_chunk(bool adapters_are_float, const F& f) {
  if constexpr (sizeof(typename Element::Storage) == 2) {
    if (adapters_are_float) return f(RoundedChunk<Element, kAligned>{});
  }
  f(PlainChunk<Element, kAligned>{});
}

// The same of s, or of b where it lies as s does: in rows of `rank` elements, which may be short of a chunk by half.
template <class Element, bool kAligned, class F>
LK_DEVICE void with_rank_chunk(const Operand& m, bool is_float, const F& f) {
  if constexpr (!kAligned) {
    if (!is_float && HalvesChunk<Element>::fits(m)) return f(HalvesChunk<Element>{});
  }
  with_adapter_chunk<Element, kAligned>(is_float, f);
}

// A chunk that chooses itself, within a loop that is not to be there twice.
template <class Element, bool kAligned>
LK_DEVICE auto adapter_chunk(bool adapters_are_float) {
  if constexpr (sizeof(typename Element::Storage) == 2) {
    return EitherChunk<RoundedChunk<Element, kAligned>, PlainChunk<Element, kAligned>>{adapters_are_float};
  } else {
    return PlainChunk<Element, kAligned>{};
  }
}

// How a product of a fragment's ranks enters the accumulator. Scaled in fp32: s and b are rounded already, their
// product must not be.
struct ScaledSum {
  float scale;

  LK_DEVICE void add(float (&acc)[4], const float (&product)[4], int, int) {
    LK_UNROLL
    for (int i = 0; i < 4; ++i) acc[i] += scale * product[i];
  }
};

// The same under a mask: bits in shared memory (KeepBits), one per element of the tile.
template <class Base>
struct MaskedSum {
  using Keep = KeepBits<Base::kM, Base::kN>;
  float scale;
  uint32_t bits;
  uint32_t word[2] = {};  // of the rows and the 32 columns in work

  LK_DEVICE void add(float (&acc)[4], const float (&product)[4], int mi, int ni) {
    const int lane = thread_index() % kWarp;
    const int column = Base::warp_column() + ni * 8;
    LK_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = Base::warp_row() + mi * 16 + half * 8 + FragmentC::row(lane);
      if (ni % 4 == 0) word[half] = Keep::word(bits, row, column);
      LK_UNROLL
      for (int i = 0; i < 2; ++i) {
        const bool kept = word[half] >> (column % 32 + FragmentC::column(lane) + i) & 1;
        acc[half * 2 + i] += kept ? scale * product[half * 2 + i] : 0.0f;
      }
    }
  }
};

template <class Base, Access kAccess>
struct LoraBranch {
  using Element = typename Base::Element;
  // As many ranks at a time as the stages hold; s lies where a stage has P, b where it has Q.
  static constexpr int kThreads = Base::kThreads, kM = Base::kM, kDepth = Base::kDepth;
  static constexpr int kBatch = Base::kStages * kDepth;

  LK_DEVICE static uint32_t stage_of(uint32_t smem, int depth) { return smem + depth / kDepth * Base::kBytesStage; }

  // s comes from other blocks: it is there when their flag has the value `expected`.
  template <class Sum>
  LK_DEVICE static void add(const LoraLinearParams& p, uint32_t smem, int row0, int column0, const uint32_t* flag,
                            uint32_t expected, typename Base::Accumulator& acc, Sum sum) {
    const Operand s{p.s, p.rank, p.m, p.rank};
    LK_NO_UNROLL
    for (int batch = 0; batch < p.rank; batch += kBatch) {
      const int end = smaller(p.rank, batch + kBatch);
      load_b(p, smem, column0, batch, end);
      if (batch == 0) {  // b is on its way while this waits
        if (thread_index() == 0) {
          while (load_acquire(flag) != expected) pause();
        }
        sync_block();
      }
      load_s(s, smem, row0, batch, end);
      copy_async_commit();
      copy_async_wait<0>();
      sync_block();
      multiply(smem, end - batch, acc, sum);
      if (end < p.rank) sync_block();
    }
  }

  // s is what `shrink` (ShrinkTask) has computed beside this tile. `on_s_ready` is called when it lies in shared
  // memory.
  template <class Shrink, class Ready>
  LK_DEVICE static void add_own(const LoraLinearParams& p, uint32_t smem, int column0, Shrink& shrink, float* partial_s,
                                typename Base::Accumulator& acc, const Ready& on_s_ready) {
    load_b(p, smem, column0, 0, p.rank);
    copy_async_commit();
    shrink.stage(smem, p.rank, partial_s);
    copy_async_wait<0>();
    sync_block();
    on_s_ready();
    multiply(smem, p.rank, acc, ScaledSum{p.scaling});
  }

  // Writes s, staged by this block, to memory.
  LK_DEVICE static void store_s(const LoraLinearParams& p, uint32_t smem, int row0) {
    LK_NO_UNROLL
    for (int r = 0; r < p.rank; r += kDepth) {
      store_tile<Element, kM, kDepth, kThreads>(stage_of(smem, r), p.s, p.rank, p.m, p.rank, row0, r,
                                                is_s_whole(kAccess));
    }
  }

 private:
  LK_DEVICE static void load_s(const Operand& s, uint32_t smem, int row0, int begin, int end) {
    with_rank_chunk<Element, is_s_whole(kAccess)>(s, false, [&](auto chunk) {
      typename Base::template LoaderP<decltype(chunk)> load(s, row0, begin);
      LK_NO_UNROLL
      for (int r = begin; r < end; r += kDepth) load.load(stage_of(smem, r - begin));
    });
  }

  LK_DEVICE static void load_b(const LoraLinearParams& p, uint32_t smem, int column0, int begin, int end) {
    const Operand b{p.b, p.b_stride, p.n, p.rank};
    // The choice lies outside of the loop: within, it costs the large tile a register too many on sm_90.
    with_rank_chunk<Element, is_b_whole(kAccess, Base::kFactors)>(b, p.adapters_are_float, [&](auto chunk) {
      typename Base::template LoaderQ<decltype(chunk)> load(b, column0, begin);
      LK_NO_UNROLL
      for (int r = begin; r < end; r += kDepth) load.load(stage_of(smem, r - begin) + Base::kOffsetQ);
    });
  }

  template <class Sum>
  LK_DEVICE static void multiply(uint32_t smem, int ranks, typename Base::Accumulator& acc, Sum sum) {
    const uint32_t offset_P = Base::lane_offset_P(), offset_Q = Base::lane_offset_Q();
    LK_NO_UNROLL
    for (int r = 0; r < ranks; r += Base::kFragmentDepth) {
      Base::for_fragments(stage_of(smem, r), offset_P, offset_Q, r % kDepth / Base::kFragmentDepth,
                          [&](int mi, int ni, const uint32_t(&a)[4], uint32_t b0, uint32_t b1) {
                            float product[4] = {};
                            Element::multiply_add(product, a, b0, b1);
                            sum.add(acc[mi][ni], product, mi, ni);
                          });
    }
  }
};

// Beside the product with w: s = x aᵀ for the tile's rows, without dropout, all ranks (at most kRankTile). The warps
// that share rows of x divide the work: by rows if there are enough, else by depth, and add up at the end.
template <class Base, int kRankTile, Access kAccess>
class ShrinkTask {
  using Element = typename Base::Element;
  static constexpr int kDepth = Base::kDepth, kSteps = Base::kSteps;
  static constexpr bool kSplitsDepth = Base::kFragmentsM < Base::kWarpsN;
  static constexpr int kFragmentsN = kRankTile / 8;
  static constexpr int kRowFragments = kSplitsDepth ? Base::kFragmentsM : Base::kFragmentsM / Base::kWarpsN;
  static_assert(kSplitsDepth ? kSteps % Base::kWarpsN == 0 : Base::kFragmentsM % Base::kWarpsN == 0);
  using TileA = OperandTile<Element, kRankTile, kDepth, Layout::kRows, ChunksFirst>;
  static constexpr bool kWhole = is_a_whole(kAccess, Layout::kRows);
  using Chunk = decltype(adapter_chunk<Element, kWhole>(true));
  using Loader = TileLoader<Element, kRankTile, kDepth, Layout::kRows, Base::kThreads, Chunk>;

 public:
  static constexpr bool kChangesStage = false;
  static constexpr int kBytes = TileA::kBytes;
  static_assert(Base::kBytesStage - Base::kOffsetSide == kBytes, "a stage has a place for a");
  static_assert(kRankTile <= Base::kStages * kDepth, "all of s lies in the stages, as LoraBranch wants it");

  LK_DEVICE ShrinkTask(const LoraLinearParams& p, int k0, int k1)
      : loader_({p.a, p.a_stride, p.rank, k1}, 0, k0, adapter_chunk<Element, kWhole>(p.adapters_are_float)) {}

  LK_DEVICE void fill(uint32_t place) { loader_.load(place); }

  LK_DEVICE void on_stage_ready(uint32_t stage, int) {
    const uint32_t x = stage + Base::lane_offset_P(), a = stage + Base::kOffsetSide + TileA::lane_offset(0);
    LK_UNROLL
    for (int i = 0; i < kSteps / (kSplitsDepth ? Base::kWarpsN : 1); ++i) {
      const int step = kSplitsDepth ? i * Base::kWarpsN + warp_n() : i;
      uint32_t a_part[kRankTile / 16][4];
      LK_UNROLL
      for (int j = 0; j < kRankTile / 16; ++j) TileA::load(a_part[j], a, j, step);
      LK_UNROLL
      for (int mi = 0; mi < kRowFragments; ++mi) {
        uint32_t x_part[4];
        Base::TileP::load(x_part, x, first_fragment() + mi, step);
        LK_UNROLL
        for (int ni = 0; ni < kFragmentsN; ++ni) {
          Element::multiply_add(acc_[mi][ni], x_part, a_part[ni / 2][ni % 2 * 2], a_part[ni / 2][ni % 2 * 2 + 1]);
        }
      }
    }
  }

  // Puts s where LoraBranch wants it, zero past the rank; the stages must be free. `partial` (null: none) gets
  // the unrounded sums of this block, [kM, kRankTile].
  LK_DEVICE void stage(uint32_t smem, int rank, float* partial) {
    if constexpr (kSplitsDepth) add_up(smem);
    const int lane = thread_index() % kWarp;
    LK_UNROLL
    for (int mi = 0; mi < kRowFragments; ++mi) {
      LK_UNROLL
      for (int ni = 0; ni < kFragmentsN; ++ni) {
        if (kSplitsDepth && ni % Base::kWarpsN != warp_n()) continue;
        LK_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int row = Base::warp_row() + (first_fragment() + mi) * 16 + half * 8 + FragmentC::row(lane);
          const int column = ni * 8 + FragmentC::column(lane);
          const float low = column < rank ? acc_[mi][ni][half * 2] : 0.0f;
          const float high = column + 1 < rank ? acc_[mi][ni][half * 2 + 1] : 0.0f;
          const uint32_t stage = LoraBranch<Base, kAccess>::stage_of(smem, column);
          store_shared_pair<Element>(stage + Base::TileP::Tile::element_offset(row, column % kDepth), low, high);
          if (partial != nullptr) {
            store_global(reinterpret_cast<Float2*>(partial + row * kRankTile + column), Float2{low, high});
          }
        }
      }
    }
  }

 private:
  LK_DEVICE static int warp_n() { return thread_index() / kWarp % Base::kWarpsN; }
  LK_DEVICE static int first_fragment() { return kSplitsDepth ? 0 : warp_n() * kRowFragments; }

  // Sums over the warps that share rows, in their order; warp i then has every i-th fragment.
  LK_DEVICE void add_up(uint32_t smem) {
    static_assert(Base::kWarpsM == 1);
    constexpr int kFragments = kRowFragments * kFragmentsN;
    constexpr int kBytesWarp = kFragments * kWarp * 16;
    constexpr int kOffsetScratch = (kRankTile + kDepth - 1) / kDepth * Base::kBytesStage;
    static_assert(kOffsetScratch + Base::kWarpsN * kBytesWarp <= Base::kSharedBytes);
    const uint32_t scratch = smem + kOffsetScratch;
    const int lane = thread_index() % kWarp;
    LK_UNROLL
    for (int i = 0; i < kFragments; ++i) {
      store_shared_16(scratch + warp_n() * kBytesWarp + (i * kWarp + lane) * 16,
                      vec16_of(acc_[i / kFragmentsN][i % kFragmentsN]));
    }
    sync_block();
    LK_UNROLL
    for (int i = 0; i < kFragments; ++i) {
      if (i % kFragmentsN % Base::kWarpsN != warp_n()) continue;
      float(&sum)[4] = acc_[i / kFragmentsN][i % kFragmentsN];
      LK_UNROLL
      for (int j = 0; j < 4; ++j) sum[j] = 0.0f;
      LK_UNROLL
      for (int w = 0; w < Base::kWarpsN; ++w) {
        const Vec16 part = load_shared_16(scratch + w * kBytesWarp + (i * kWarp + lane) * 16);
        LK_UNROLL
        for (int j = 0; j < 4; ++j) sum[j] += float_of(part.word[j]);
      }
    }
  }

  Loader loader_;
  float acc_[kRowFragments][kFragmentsN][4] = {};
};

// acc + bias in shared memory, where all threads have finished; and they have again.
template <class Base>
LK_DEVICE void stage_with_bias(const LoraLinearParams& p, uint32_t smem, int column0,
                               const typename Base::Accumulator& acc) {
  using Element = typename Base::Element;
  const auto* const bias_gmem = static_cast<const typename Element::Storage*>(p.bias);
  float bias[Base::kFragmentsN][2];  // loaded once for all rows
  LK_UNROLL
  for (int ni = 0; ni < Base::kFragmentsN; ++ni) {
    LK_UNROLL
    for (int j = 0; j < 2; ++j) {
      const int column = column0 + Base::warp_column() + ni * 8 + FragmentC::column(thread_index() % kWarp) + j;
      bias[ni][j] = bias_gmem != nullptr && column < p.n ? Element::low(load_global(bias_gmem + column)) : 0.0f;
    }
  }
  sync_block();
  stage_accumulators<Base>(smem, [&](int mi, int ni, int i, int) { return acc[mi][ni][i] + bias[ni][i % 2]; });
  sync_block();
}

// Whether rows of y consist of chunks: asked where they are stored, and of no matter to what is read.
template <class Element>
LK_DEVICE bool is_y_whole(const LoraLinearParams& p) {
  constexpr int kElements = chunk_elements(sizeof(typename Element::Storage));
  return p.n % kElements == 0 && p.y_stride % kElements == 0 && reinterpret_cast<uintptr_t>(p.y) % kChunkBytes == 0;
}

// acc = y, by way of shared memory, which is free before and after. Rows of y are whole.
template <class Base>
LK_DEVICE void load_y(const LoraLinearParams& p, uint32_t smem, int row0, int column0,
                      typename Base::Accumulator& acc) {
  using Element = typename Base::Element;
  using Tile = SharedTile<Base::kN, sizeof(typename Element::Storage)>;
  TileLoader<Element, Base::kM, Base::kN, Layout::kRows, Base::kThreads, AsyncChunk<Element>> loader(
      {p.y, p.y_stride, p.m, p.n}, row0, column0);
  loader.load(smem);
  copy_async_commit();
  copy_async_wait<0>();
  sync_block();
  const int lane = thread_index() % kWarp;
  LK_UNROLL
  for (int mi = 0; mi < Base::kFragmentsM; ++mi) {
    LK_UNROLL
    for (int ni = 0; ni < Base::kFragmentsN; ++ni) {
      LK_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = Base::warp_row() + mi * 16 + half * 8 + FragmentC::row(lane);
        const int column = Base::warp_column() + ni * 8 + FragmentC::column(lane);
        const Float2 pair = load_shared_pair<Element>(smem + Tile::element_offset(row, column));
        acc[mi][ni][half * 2] = pair.x;
        acc[mi][ni][half * 2 + 1] = pair.y;
      }
    }
  }
  sync_block();
}

// y = acc + bias, by way of shared memory.
template <class Base>
LK_DEVICE void epilogue(const LoraLinearParams& p, uint32_t smem, int row0, int column0,
                        const typename Base::Accumulator& acc) {
  using Element = typename Base::Element;
  stage_with_bias<Base>(p, smem, column0, acc);
  store_tile<Element, Base::kM, Base::kN, Base::kThreads>(smem, p.y, p.y_stride, p.m, p.n, row0, column0,
                                                          is_y_whole<Element>(p));
}

}  // namespace lk
