// Few rows, each with an adapter of its own, in one launch: schedule "decode" of multi_lora_linear.
//
// Reading w is what counts, and it is read once: blocks share out its columns and the depth, and multiply all rows by
// it, as in lora_linear's schedule of the same name (lora_linear_dual.cuh). There every block computes s beside its
// product; here that would be an adapter for every row, read by every block. So s has blocks of its own, with the first
// tickets, which wait for nobody: a warp has one rank of one row. Of the blocks that share columns, the last one to
// arrive sums up, waits for s, and adds to each row its own s bᵀ.
//
// What is added to a row is a loop over its adapter's ranks, and depends on no other row's. A row without an adapter
// gets nothing, not even a zero.
#pragma once

#include "adapter_pools.cuh"
#include "between_blocks.cuh"
#include "gemm.cuh"
#include "lora_branch.cuh"
#include "rows.cuh"

namespace lk {

// A chunk's elements, as numbers.
template <class Element>
struct ChunkNumbers {
  using Storage = typename Element::Storage;
  static constexpr int kCount = chunk_elements(sizeof(Storage));
  float number[kCount];

  // At a multiple of 16 bytes.
  LK_DEVICE void load(const Storage* source) {
    const Vec16 v = load_global(reinterpret_cast<const Vec16*>(source));
    LK_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(Storage) == 2) {
        number[2 * i] = Element::low(v.word[i]);
        number[2 * i + 1] = Element::high(v.word[i]);
      } else {
        number[i] = Element::low(v.word[i]);
      }
    }
  }

  // Of an fp32 adapter under 16-bit elements, to which they are rounded.
  LK_DEVICE void load(const float* source) {
    LK_UNROLL
    for (int i = 0; i < kCount; i += 4) {
      const Vec16 v = load_global(reinterpret_cast<const Vec16*>(source + i));
      LK_UNROLL
      for (int j = 0; j < 4; ++j) number[i + j] = rounded(float_of(v.word[j]));
    }
  }

  // The first `count` of them, at any address; the others stay as they are.
  template <class Stored>
  LK_DEVICE void load_some(const Stored* source, int count) {
    LK_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (i >= count) continue;
      if constexpr (std::is_same_v<Stored, Storage>) {
        number[i] = Element::low(load_global(source + i));
      } else {
        number[i] = rounded(load_global(source + i));
      }
    }
  }

 private:
  LK_DEVICE static float rounded(float f) { return Element::low(Element::pack(f, 0.0f)); }
};

template <class Base_>
struct MultiLoraDecode {
  using Base = Base_;
  using Element = typename Base::Element;
  static constexpr Access kAccess = Access::kWhole;
  static constexpr int kRankTile = 0;  // any rank
  static constexpr int kThreads = Base::kThreads, kMinBlocks = 2;

  LK_DEVICE static void run(const MultiLoraDecodeParams& p) {
    const uint32_t smem = dynamic_shared();
    const LoraLinearParams& all = p.lora;
    acquire_work(all.counters, smem + kOffsetWork, [&](int ticket) {
      const int columns = rank_columns(all), base = ticket - all.m * columns;
      return base < 0 ? WorkItem{true, ticket / columns, ticket % columns}
                      : WorkItem{false, base % all.splits, base / all.splits};
    });
    const WorkItem work = current_work(smem + kOffsetWork);
    if (work.is_shrink) {
      shrink(p, smem, work.row, work.column * kWarps + warp_index());
    } else {
      base(p, smem, work.row, work.column * Base::kN);
    }
  }

 private:
  using Storage = typename Element::Storage;
  using Numbers = ChunkNumbers<Element>;
  static constexpr int kWarps = kThreads / kWarp;
  static_assert(kWarps == kRanksOfDecodeBlock);
  static constexpr int kOffsetWork = larger(Base::kSharedBytes, Base::kBytesResult);
  static constexpr int kDone = 1, kFirstArrival = 2;  // counters

  LK_DEVICE static int rank_columns(const LoraLinearParams& p) { return ceil_div(p.rank, kWarps); }

  LK_DEVICE static PoolAdapter adapter_of(const MultiLoraDecodeParams& p, int row) {
    return adapter_in(p.pools, integer_at(p.ids, row), p.lora.rank, p.lora.scaling);
  }

  // f(first) with the first element of an adapter's factor, of its type.
  template <class F>
  LK_DEVICE static void with_type(const LoraLinearParams& p, const void* first, const F& f) {
    if constexpr (sizeof(Storage) == 2) {
      if (p.adapters_are_float) return f(static_cast<const float*>(first));
    }
    f(static_cast<const Storage*>(first));
  }

  // ---- s

  LK_DEVICE static void shrink(const MultiLoraDecodeParams& p, uint32_t smem, int row, int rank) {
    const LoraLinearParams& all = p.lora;
    const PoolAdapter adapter = adapter_of(p, row);
    if (rank < all.rank) {
      float sum = 0.0f;
      if (rank < adapter.rank) {
        with_type(all, static_cast<const char*>(all.a) + adapter.number * p.pools.a_step, [&](const auto* a) {
          const auto* const x = static_cast<const Storage*>(all.x) + row * all.x_stride;
          sum = sum_of_lanes(smem + warp_index() * kWarp * 4, product(x, a + rank * all.a_stride, all.k));
        });
      }
      if (lane_index() == 0) {
        store_global_rounded<Element>(static_cast<Storage*>(all.s) + static_cast<int64_t>(row) * all.rank + rank, sum);
      }
    }
    sync_block();
    if (thread_index() == 0) atomic_add_acquire_release(all.counters + kDone, 1);
  }

  // This lane's part of x aᵀ for two rows: a chunk in 32.
  template <class Adapter>
  LK_DEVICE static float product(const Storage* x, const Adapter* a, int k) {
    constexpr int kAhead = 4;  // chunks that are on their way together
    float sum = 0.0f;
    LK_NO_UNROLL
    for (int first = lane_index() * Numbers::kCount; first < k; first += kAhead * kWarp * Numbers::kCount) {
      Numbers of_x[kAhead] = {}, of_a[kAhead] = {};
      LK_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        const int at = first + i * kWarp * Numbers::kCount;
        if (at >= k) continue;
        of_x[i].load(x + at);
        of_a[i].load(a + at);
      }
      LK_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        LK_UNROLL
        for (int j = 0; j < Numbers::kCount; ++j) sum += of_x[i].number[j] * of_a[i].number[j];
      }
    }
    return sum;
  }

  // In the order of the lanes. All of a warp call it, with words of their own.
  LK_DEVICE static float sum_of_lanes(uint32_t smem, float part) {
    store_shared_4(smem + lane_index() * 4, bits_of(part));
    sync_warp();
    float sum = 0.0f;
    LK_UNROLL
    for (int i = 0; i < kWarp; i += 4) {
      const Vec16 parts = load_shared_16(smem + i * 4);
      LK_UNROLL
      for (int j = 0; j < 4; ++j) sum += float_of(parts.word[j]);
    }
    return sum;
  }

  // ---- y

  LK_DEVICE static void base(const MultiLoraDecodeParams& p, uint32_t smem, int split, int column0) {
    const LoraLinearParams& all = p.lora;
    const int k0 = split * all.split_depth, k1 = smaller(k0 + all.split_depth, all.k);
    typename Base::Accumulator acc = {};
    using Chunk = AsyncChunk<Element>;
    Base::template run<Chunk, Chunk>(smem, {all.x, all.x_stride, all.m, all.k}, 0, {all.w, all.w_stride, all.n, all.k},
                                     column0, k0, k1, acc, NoSideTask{});
    if (all.splits > 1) {
      const int tile = column0 / Base::kN;
      float* const partials = all.partials + static_cast<int64_t>(tile) * all.splits * kPartial<Base>;
      store_partial<Base>(partials + split * kPartial<Base>, acc);
      if (!arrive_last(all.counters + kFirstArrival + tile, all.splits, smem)) return;
      sum_partials<Base>(partials, all.splits, acc);
    }
    if (thread_index() == 0) {
      const auto expected = static_cast<uint32_t>(all.m * rank_columns(all));
      while (load_acquire(all.counters + kDone) != expected) pause();
    }
    sync_block();
    LK_UNROLL
    for (int mi = 0; mi < Base::kFragmentsM; ++mi) {
      LK_UNROLL
      for (int half = 0; half < 2; ++half) add_branch(p, column0, mi, half, acc[mi]);
    }
    epilogue<Base>(all, smem, 0, column0, acc);
  }

  // To this thread's elements of one row.
  LK_DEVICE static void add_branch(const MultiLoraDecodeParams& p, int column0, int mi, int half,
                                   float (&acc)[Base::kFragmentsN][4]) {
    const LoraLinearParams& all = p.lora;
    const int lane = lane_index(), row = Base::warp_row() + mi * 16 + half * 8 + FragmentC::row(lane);
    if (row >= all.m) return;
    const PoolAdapter adapter = adapter_of(p, row);
    if (adapter.rank == 0) return;
    const Storage* const s = static_cast<const Storage*>(all.s) + static_cast<int64_t>(row) * all.rank;
    const int first_column = column0 + Base::warp_column() + FragmentC::column(lane);
    float branch[Base::kFragmentsN][2] = {};
    with_type(all, static_cast<const char*>(all.b) + adapter.number * p.pools.b_step, [&](const auto* b) {
      LK_NO_UNROLL
      for (int r = 0; r < adapter.rank; r += Numbers::kCount) {
        const int ranks = smaller(adapter.rank - r, Numbers::kCount);
        Numbers of_s = {};
        of_s.load_some(s + r, ranks);
        LK_UNROLL
        for (int ni = 0; ni < Base::kFragmentsN; ++ni) {
          LK_UNROLL
          for (int i = 0; i < 2; ++i) {
            const int column = first_column + ni * 8 + i;
            if (column >= all.n) continue;
            Numbers of_b = {};
            if (p.pools.ranks_are_whole) {
              of_b.load(b + column * all.b_stride + r);
            } else {
              of_b.load_some(b + column * all.b_stride + r, ranks);
            }
            LK_UNROLL
            for (int j = 0; j < Numbers::kCount; ++j) {
              if (j < ranks) branch[ni][i] += of_s.number[j] * of_b.number[j];
            }
          }
        }
      }
    });
    LK_UNROLL
    for (int ni = 0; ni < Base::kFragmentsN; ++ni) {
      LK_UNROLL
      for (int i = 0; i < 2; ++i) acc[ni][half * 2 + i] += adapter.scaling * branch[ni][i];
    }
  }

 public:
  static constexpr int kSharedBytes = kOffsetWork + kBytesWork;
};

}  // namespace lk
