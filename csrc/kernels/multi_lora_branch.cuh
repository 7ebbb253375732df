// The branch of many rows that have adapters in pools, beside the vendor's product of all rows with the weight:
//
// - MultiLoraOrder looks up each adapter's rows (multi_lora_order.cuh). What follows has blocks of rows that share an
//   adapter, numbered as those of groups are (row_groups.cuh), and finds the rows through this order;
// - MultiLoraShrink computes s = dropout(x) aᵀ, or s' = dY B;
// - MultiLoraExpand adds scaling · s bᵀ to y, or mask ∘ (s' A) to dX. Rows without an adapter are in nobody's blocks,
//   and no bit of theirs is touched;
// - MultiLoraGrads sums dA and dB of each adapter over its rows, with the kernel of groups (lora_grads.cuh).
//
// What a pool holds beyond an adapter's ranks is multiplied by nothing, and s is zero there before the launches.
#pragma once

#include "adapter_pools.cuh"
#include "between_blocks.cuh"
#include "gemm.cuh"
#include "lora_branch.cuh"
#include "lora_grads.cuh"
#include "row_groups.cuh"

namespace lk {

// f(target in shared memory, place in memory, column) for every chunk of a tile whose rows stand in an order; f is not
// called where there is no row or column.
template <class Element, int kRows, int kColumns, int kThreads, class F>
LK_DEVICE void for_ordered_chunks(uint32_t smem, void* matrix, int64_t stride, const OrderedRows& rows, int columns,
                                  int column0, const F& f) {
  using Storage = typename Element::Storage;
  using Grid = ChunkGrid<SharedTile<kColumns, sizeof(Storage)>, kRows, kThreads>;
  const Grid grid;
  const int column = column0 + grid.column;
  if (column >= columns) return;
  LK_UNROLL
  for (int step = 0; step < Grid::kSteps; ++step) {
    const int row = grid.row + step * Grid::kRowStep;
    if (!Grid::has(step) || rows.first + row >= rows.end) break;
    f(Grid::target(smem, grid.first_target, step), static_cast<Storage*>(matrix) + rows(row) * stride + column, column);
  }
}

// What blocks of MultiLoraShrink and MultiLoraExpand have.
struct AdapterRows {
  OrderedRows rows;
  PoolAdapter adapter;  // no ranks: there is nothing to do
};

template <int kRows>
LK_DEVICE AdapterRows find_adapter_rows(const MultiLoraBranchParams& p, int row_block, uint32_t smem) {
  const GroupRows found = find_group_rows<false>(p.groups, p.lora.m, row_block, kRows, smem);
  const bool has_rows = found.first < found.end && found.group < p.groups.count;
  return {{p.order, found.first, found.end},
          adapter_in(p.pools, has_rows ? found.group : -1, p.lora.rank, p.lora.scaling)};
}

// EndingChunk of an fp32 adapter under 16-bit elements.
template <class Element>
struct RoundedEndingChunk {
  static constexpr bool kAligned = false;

  LK_DEVICE static constexpr int element_bytes() { return 4; }
  LK_DEVICE static void load(uint32_t smem, const unsigned char* source, bool inside, int elements) {
    using Format = Float32Format<Element>;
    const int valid = inside ? elements : 0;
    store_shared_16(smem, valid >= Format::kChunkElements ? Format::template decode<true>(source, valid)
                                                          : Format::template decode<false>(source, valid));
  }
};

// f(operand, Chunk{}) of a factor of the adapter: `first` is the first adapter's; rank_rows: as many rows of memory as
// there are ranks, else these have as many elements.
template <class Element, bool kRanksInMemoryRows, class F>
LK_DEVICE void with_pool_factor(const MultiLoraBranchParams& p, const Operand& factor, const F& f) {
  const bool is_float = p.lora.adapters_are_float;
  if constexpr (kRanksInMemoryRows) {
    with_adapter_chunk<Element, true>(is_float, [&](auto chunk) { f(factor, chunk); });
  } else if (p.pools.ranks_are_whole) {
    if constexpr (sizeof(typename Element::Storage) == 2) {
      if (is_float) return f(factor, RoundedEndingChunk<Element>{});
    }
    f(factor, EndingChunk<Element>{});
  } else {
    with_adapter_chunk<Element, false>(is_float, [&](auto chunk) { f(factor, chunk); });
  }
}

// As LoraShrink, of an adapter's rows. Roles: the forward's, or the gradient's of x.
template <class Base_, class Roles>
struct MultiLoraShrink {
  using Base = Base_;
  using Element = typename Base::Element;
  static constexpr int kRankTile = Base::kN, kThreads = Base::kThreads, kM = Base::kM, kMinBlocks = 2;
  static constexpr int kOffsetRows = larger(Base::kSharedBytes, Base::kBytesResult);
  static constexpr int kSharedBytes = kOffsetRows + kBytesGroupRows;
  static constexpr bool kRanksInMemoryRows = Roles::kFactors == Layout::kRows;

  LK_DEVICE static void run(const MultiLoraBranchParams& p) {
    const uint32_t smem = dynamic_shared();
    const LoraLinearParams& all = p.lora;
    const int columns = ceil_div(all.rank, kRankTile), tile = block_index() / all.splits;
    const int split = block_index() % all.splits, column0 = tile % columns * kRankTile;
    const auto [rows, adapter] = find_adapter_rows<kM>(p, tile / columns, smem + kOffsetRows);
    if (adapter.rank <= column0) return;
    const int k0 = split * all.split_depth, k1 = smaller(k0 + all.split_depth, all.k);
    typename Base::Accumulator acc = {};
    const Operand x{all.x, all.x_stride, rows.end, all.k, rows.order};
    const void* const own_a = bytes_behind(all.a, adapter.number * p.pools.a_step);
    float scale = 1.0f;
    with_pool_factor<Element, kRanksInMemoryRows>(p, {own_a, all.a_stride, adapter.rank, all.k},
                                                  [&](const Operand& a, auto chunk) {
                                                    const auto run = [&](auto&& task) {
                                                      Base::template run<InOrder<AsyncChunk<Element>>, decltype(chunk)>(
                                                          smem, x, rows.first, a, column0, k0, k1, acc, task);
                                                    };
                                                    if (Roles::kDropsX && all.seed != nullptr) {
                                                      run(DropRows{rows, DropoutMask(all, all.k)});
                                                      scale = all.dropout_scale;
                                                    } else {
                                                      run(NoSideTask{});
                                                    }
                                                  });
    sync_block();  // the stages are free
    if (all.splits > 1) {
      float* const partials = all.partials + static_cast<int64_t>(tile) * all.splits * kPartial<Base>;
      store_partial<Base>(partials + split * kPartial<Base>, acc);
      if (!arrive_last(all.counters + tile, all.splits, smem)) return;
      sum_partials<Base>(partials, all.splits, acc);
      sync_block();  // arrive_last's word is free
    }
    // Columns past the ranks are products of others, or of what the pool holds there.
    stage_accumulators<Base>(smem, [&](int mi, int ni, int i, int column) {
      return column0 + column < adapter.rank ? scale * acc[mi][ni][i] : 0.0f;
    });
    sync_block();
    using Storage = typename Element::Storage;
    for_ordered_chunks<Element, kM, kRankTile, kThreads>(smem, all.s, all.rank, rows, adapter.rank, column0,
                                                         [&](uint32_t source, Storage* target, int column) {
                                                           const Vec16 v = load_shared_16(source);
                                                           if (p.pools.ranks_are_whole) {
                                                             store_global(reinterpret_cast<Vec16*>(target), v);
                                                           } else {
                                                             store_elements(target, v, adapter.rank - column);
                                                           }
                                                         });
  }

 private:
  struct DropRows {
    static constexpr bool kChangesStage = true;
    OrderedRows rows;
    DropoutMask mask;

    LK_DEVICE void fill(uint32_t) const {}
    LK_DEVICE void on_stage_ready(uint32_t stage, int k0) const {
      drop_tile<typename Base::TileP::Tile, kM, kThreads>(stage, rows, k0, mask);
    }
  };
};

// A tile of y, of rows that share an adapter.
template <class Base_, class Roles>
struct MultiLoraExpand {
  using Base = Base_;
  using Element = typename Base::Element;
  static constexpr int kRankTile = 0, kThreads = Base::kThreads, kM = Base::kM, kMinBlocks = 2;
  using Keep = KeepBits<kM, Base::kN>;
  static constexpr int kOffsetKeep = larger(Base::kSharedBytes, Base::kBytesResult);
  static constexpr int kOffsetRows = kOffsetKeep + (Roles::kDropsX ? 0 : Keep::kBytes);
  static constexpr int kSharedBytes = kOffsetRows + kBytesGroupRows;
  static constexpr bool kRanksInMemoryRows = Roles::kFactors == Layout::kColumns;

  LK_DEVICE static void run(const MultiLoraBranchParams& p) {
    const uint32_t smem = dynamic_shared();
    const LoraLinearParams& all = p.lora;
    const int columns = ceil_div(all.n, Base::kN), column0 = block_index() % columns * Base::kN;
    const auto [rows, adapter] = find_adapter_rows<kM>(p, block_index() / columns, smem + kOffsetRows);
    if (adapter.rank == 0) return;
    const bool drops = !Roles::kDropsX && all.seed != nullptr;
    if (drops) {
      Keep::template compute<kThreads>(smem + kOffsetKeep, rows, column0, DropoutMask(all, all.n));
    }
    typename Base::Accumulator acc = {};
    const Operand s{all.s, all.rank, rows.end, adapter.rank, rows.order};
    const void* const own_b = bytes_behind(all.b, adapter.number * p.pools.b_step);
    with_pool_factor<Element, kRanksInMemoryRows>(
        p, {own_b, all.b_stride, all.n, adapter.rank}, [&](const Operand& b, auto chunk) {
          const auto run = [&](auto chunk_of_s) {
            Base::template run<decltype(chunk_of_s), decltype(chunk)>(smem, s, rows.first, b, column0, 0, adapter.rank,
                                                                      acc, NoSideTask{});
          };
          if (p.pools.ranks_are_whole) {
            run(InOrder<EndingChunk<Element>>{});
          } else {
            run(InOrder<GatheredChunk<Element>>{});
          }
        });
    sync_block();  // the stages are free
    using Storage = typename Element::Storage;
    const auto for_chunks = [&](const auto& f) {
      for_ordered_chunks<Element, kM, Base::kN, kThreads>(smem, all.y, all.y_stride, rows, all.n, column0, f);
    };
    for_chunks([](uint32_t target, Storage* source, int) { copy_async_16(target, source, kChunkBytes); });
    copy_async_commit();
    copy_async_wait<0>();
    sync_block();
    add_to_tile(smem, drops, drops ? adapter.scaling * all.dropout_scale : adapter.scaling, acc);
    sync_block();
    for_chunks([](uint32_t source, Storage* target, int) {
      store_global(reinterpret_cast<Vec16*>(target), load_shared_16(source));
    });
  }

 private:
  // scale · acc, where it is kept, to a tile of elements. What there is past the end of y is not stored.
  LK_DEVICE static void add_to_tile(uint32_t smem, bool drops, float scale, const typename Base::Accumulator& acc) {
    using Tile = SharedTile<Base::kN, sizeof(typename Element::Storage)>;
    const int lane = thread_index() % kWarp;
    LK_UNROLL
    for (int mi = 0; mi < Base::kFragmentsM; ++mi) {
      LK_UNROLL
      for (int ni = 0; ni < Base::kFragmentsN; ++ni) {
        LK_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int row = Base::warp_row() + mi * 16 + half * 8 + FragmentC::row(lane);
          const int column = Base::warp_column() + ni * 8 + FragmentC::column(lane);
          const uint32_t keep = drops ? Keep::word(smem + kOffsetKeep, row, column) >> column % 32 : 3u;
          const uint32_t place = smem + Tile::element_offset(row, column);
          const Float2 y = load_shared_pair<Element>(place);
          store_shared_pair<Element>(place, y.x + ((keep & 1) != 0 ? scale * acc[mi][ni][half * 2] : 0.0f),
                                     y.y + ((keep & 2) != 0 ? scale * acc[mi][ni][half * 2 + 1] : 0.0f));
        }
      }
    }
  }
};

// What GroupedLoraGrads asks of rows that stand in an order.
struct OrderedPoolRows {
  using Params = MultiLoraGradsParams;
  static constexpr bool kRanksDiffer = true;
  template <class Chunk>
  using Of = InOrder<Chunk>;

  LK_DEVICE static const int32_t* order(const Params& p) { return p.order; }
  LK_DEVICE static OrderedRows rows_from(const int32_t* order, int first, int end) { return {order, first, end}; }
  LK_DEVICE static int rank_of(const Params& p, int group) {
    return adapter_in(p.pools, group, p.lora.rank, p.lora.scaling).rank;
  }
  LK_DEVICE static float scaling_of(const Params& p, int group) {
    return adapter_in(p.pools, group, p.lora.rank, p.lora.scaling).scaling;
  }
};

template <class Grads>
using MultiLoraGrads = GroupedLoraGrads<Grads, OrderedPoolRows>;

}  // namespace lk
