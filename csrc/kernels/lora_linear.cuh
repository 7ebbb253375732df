// y = x wᵀ + bias + scaling · s bᵀ, s = dropout(x) aᵀ, in one launch: schedules "ticketed" and "column-0".
//
// Ticketed: a block acquires one piece of work, by a ticket. *Shrink* tiles compute s for a block of rows; *base*
// tiles compute y. For a group of row blocks the shrink tiles have the lower tickets. A base tile multiplies x by w
// first and needs its rows of s only then; by that time they are nearly always there, and if not it waits for a flag.
// It waits only for lower tickets, which belong to blocks that are running or done: no deadlock, whatever the order the
// blocks start in. Column-0: there are no shrink tiles; the base tiles of column 0 compute s beside y.
//
// Where what happens to one tile is:
// - between_blocks.cuh: which tile a block computes (tickets), how the last block cleans up, flags between blocks;
// - row_groups.cuh: which rows and whose factors a tile has, where rows belong to groups;
// - members.cuh: which columns and whose factors, where a launch is of several layers of one x;
// - lora_linear.cuh: shrink and base tiles, and what the forward and the gradient of x do differently (*Roles);
// - operand.cuh: x, w, a and b from memory to shared memory (walks and chunks) and from there to fragments;
// - formats/: operands that are decoded on the way, as fp32 adapters are;
// - gemm.cuh: the main loop, x wᵀ or x aᵀ; main_loop.cuh: what is asked of one;
// - dropout.cuh: the mask, on a stage of x or as bits for the branch;
// - lora_branch.cuh: acc += scaling · s bᵀ, with s of other blocks or of this one (ShrinkTask), and the epilogue;
// - pack_branch.cuh: the same of all members of a pack;
// - store.cuh: accumulators to rows of memory, and sums of parts of the depth.
// lora_linear_wgmma.cuh is another kernel of the same, for sm_90a alone.
// lora_linear_dual.cuh has the schedules of few rows or columns, lora_shrink_expand.cuh the branch by itself for where
// the vendor multiplies x by w, lora_grads.cuh dA and dB; lora_linear_variants.cuh lists all kernels with their keys,
// and config/lora_linear.h chooses one. multi_lora_decode.cuh and multi_lora_branch.cuh are for rows with adapters of
// their own.
//
// The gradient of x is the same computation: dX = dY W + scaling · mask ∘ (s' A), s' = dY B, where w, a and b lie the
// other way round in memory, and dropout acts on the branch's result.
#pragma once

#include "between_blocks.cuh"
#include "gemm.cuh"
#include "lora_branch.cuh"
#include "members.cuh"
#include "pack_branch.cuh"
#include "row_groups.cuh"

namespace lk {

// The shrink tile's task beside its product where x is dropped out.
template <class Shrink>
struct DropX {
  static constexpr bool kChangesStage = true;
  int row0;
  DropoutMask mask;

  LK_DEVICE void fill(uint32_t) const {}
  LK_DEVICE void on_stage_ready(uint32_t stage, int k0) const {
    drop_tile<typename Shrink::TileP::Tile, Shrink::kM, Shrink::kThreads>(stage, NextRows{row0}, k0, mask);
  }
};

// The shrink tile's task beside s' = dY B: while dY is here, these rows' part of dB = dYᵀ s.
template <class Shrink, Access kAccess>
class PartOfGradB {
  using Element = typename Shrink::Element;
  static constexpr int kM = Shrink::kM, kRank = Shrink::kN, kSteps = kM / Shrink::kFragmentDepth;
  static_assert(kRank == 16);
  using SavedS = OperandTile<Element, kRank, kM, Layout::kColumns, RowsFirst>;
  using GradY = OperandTile<Element, Shrink::kDepth, kM, Layout::kColumns, ChunksFirst>;  // a stage's tile, seen as dYᵀ

 public:
  static constexpr bool kChangesStage = false;
  static_assert(SavedS::kBytes == Shrink::kBytesResult, "as many bytes as GradXRoles keeps for it");

  LK_DEVICE PartOfGradB(const LoraLinearParams& p, uint32_t smem, int row0) : n_(p.k) {
    const Operand s{p.saved_s, p.rank, p.rank, p.m};
    using Chunk = PlainChunk<Element, is_s_whole(kAccess)>;
    TileLoader<Element, kRank, kM, Layout::kColumns, Shrink::kThreads, Chunk>(s, 0, row0).load(smem);
    copy_async_commit();
    copy_async_wait<0>();
    sync_block();
    LK_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      uint32_t s_both[4];
      SavedS::load(s_both, smem + SavedS::lane_offset(0), 0, step);
      s_[step][0] = first_column() == 0 ? s_both[0] : s_both[2];
      s_[step][1] = first_column() == 0 ? s_both[1] : s_both[3];
    }
    out_ = p.partial_grad_b + static_cast<int64_t>(row0 / kM) * n_ * kRank;
  }

  LK_DEVICE void fill(uint32_t) const {}

  LK_DEVICE void on_stage_ready(uint32_t stage, int n0) const {
    const int lane = thread_index() % kWarp;
    LK_UNROLL
    for (int row = thread_index() / kWarp / 2 * 16; row < Shrink::kDepth; row += Shrink::kThreads / kWarp / 2 * 16) {
      const uint32_t grad_y = stage + GradY::lane_offset(row);
      float acc[4] = {};
      LK_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        uint32_t a[4];
        GradY::load(a, grad_y, 0, step);
        Element::multiply_add(acc, a, s_[step][0], s_[step][1]);
      }
      LK_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int n = n0 + row + half * 8 + FragmentC::row(lane);
        if (n >= n_) continue;
        store_global(reinterpret_cast<Float2*>(out_ + static_cast<int64_t>(n) * kRank + first_column() +
                                               FragmentC::column(lane)),
                     Float2{acc[half * 2], acc[half * 2 + 1]});
      }
    }
  }

 private:
  // Two warps share rows of dB, and each has half of the columns.
  LK_DEVICE static int first_column() { return thread_index() / kWarp % 2 * 8; }

  uint32_t s_[kSteps][2];
  int n_;
  float* out_;
};

// What the forward and the gradient of x do differently. How w and a lie in memory;
// - for a shrink tile, `ShrinkSide`: the task beside its product;
// - for a base tile, `BranchSide`: how the branch enters it;
// each with the bytes of shared memory that it takes behind the stages.
struct ForwardRoles {
  static constexpr Layout kFactors = Layout::kRows;
  static constexpr bool kDropsX = true;  // on the way to s; else the branch

  template <class Shrink, Access>
  struct ShrinkSide {
    static constexpr int kBytes = 0;

    // run(task); returns what s is multiplied by.
    template <class Run>
    LK_DEVICE static float with_task(const LoraLinearParams& p, uint32_t, int row0, const Run& run) {
      if (p.seed != nullptr) {
        run(DropX<Shrink>{row0, DropoutMask(p, p.k)});
        return p.dropout_scale;
      }
      run(NoSideTask{});
      return 1.0f;
    }
  };

  template <class Base>
  struct BranchSide {
    static constexpr int kBytes = 0;

    // add(sum) with the way a product enters the accumulator.
    template <class Add>
    LK_DEVICE static void with_sum(const LoraLinearParams& p, uint32_t, int, int, const Add& add) {
      add(ScaledSum{in_register(p.scaling)});
    }
  };
};

struct GradXRoles {
  static constexpr Layout kFactors = Layout::kColumns;
  static constexpr bool kDropsX = false;

  template <class Shrink, Access kAccess>
  struct ShrinkSide {
    static constexpr bool kComputesGradB = Shrink::kN == 16;
    static constexpr int kBytes = kComputesGradB ? Shrink::kBytesResult : 0;  // for the saved s

    template <class Run>
    LK_DEVICE static float with_task(const LoraLinearParams& p, uint32_t smem, int row0, const Run& run) {
      if constexpr (kComputesGradB) {
        if (p.partial_grad_b != nullptr) {
          run(PartOfGradB<Shrink, kAccess>(p, smem, row0));
          return 1.0f;
        }
      }
      run(NoSideTask{});
      return 1.0f;
    }
  };

  template <class Base>
  struct BranchSide {
    using Keep = KeepBits<Base::kM, Base::kN>;
    static constexpr int kBytes = Keep::kBytes;

    template <class Add>
    LK_DEVICE static void with_sum(const LoraLinearParams& p, uint32_t smem, int row0, int column0, const Add& add) {
      if (p.seed != nullptr) {
        Keep::template compute<Base::kThreads>(smem, NextRows{row0}, column0, DropoutMask(p, p.n));
        add(MaskedSum<Base>{p.scaling * p.dropout_scale, smem});
      } else {
        add(ScaledSum{in_register(p.scaling)});
      }
    }
  };
};

// The same where no tile of s computes parts of dB: of rows in groups, as there may be as many of them as rows of dY,
// and of packs.
struct PlainGradXRoles : GradXRoles {
  template <class Shrink, Access>
  struct ShrinkSide {
    static constexpr int kBytes = 0;

    template <class Run>
    LK_DEVICE static float with_task(const LoraLinearParams&, uint32_t, int, const Run& run) {
      run(NoSideTask{});
      return 1.0f;
    }
  };
};

// kOntoY: y has the product with w already, and base tiles add the branch.
template <class Base_, int kRankTile_, Access kAccess_, class Roles, bool kColumn0 = false, class Rows = OneGroup,
          bool kOntoY = false>
struct LoraLinear {
  using Base = Base_;
  using Element = typename Base::Element;
  using Branch = LoraBranch<Base, kAccess_>;
  using Chunk = PlainChunk<Element, is_base_whole(kAccess_)>;
  static constexpr Access kAccess = kAccess_;
  static constexpr int kRankTile = kRankTile_, kThreads = Base::kThreads, kM = Base::kM;
  static constexpr int kMinBlocks = kThreads <= 128 ? 2 : 1;  // per SM: bounds the registers
  using Shrink =
      Gemm<Element, kM, kRankTile, Base::kDepth, kThreads / kWarp, 1, Base::kStages, Layout::kRows, Roles::kFactors>;
  using ShrinkSide = typename Roles::template ShrinkSide<Shrink, kAccess>;
  using BranchSide = typename Roles::template BranchSide<Base>;
  static constexpr int kOffsetAfterStages = larger(Base::kSharedBytes, Base::kBytesResult);
  static constexpr int kOffsetWork = kOffsetAfterStages + larger(ShrinkSide::kBytes, BranchSide::kBytes);
  static constexpr int kSharedBytes = kOffsetWork + kBytesWork + Rows::kBytes;
  static_assert(Shrink::kSharedBytes <= kOffsetAfterStages, "a rank tile is no wider than a base tile");

  using Params = typename Rows::Params;

  LK_DEVICE static void run(const Params& p) {
    const uint32_t smem = dynamic_shared();
    const LoraLinearParams& all = Rows::all(p);
    acquire_work(all.counters, smem + kOffsetWork, [&](int ticket) {
      const WorkItem work = work_of_ticket(ticket, Rows::row_blocks(p, kM), shrink_columns(p),
                                           Rows::base_columns(p, Base::kN), all.group_rows);
      return Rows::of_member(p, work, kRankTile, Base::kN);
    });
    if (Rows::template find<kM>(p, smem + kOffsetWork, work_of(smem).row)) {
      if (work_of(smem).is_shrink) {
        shrink_tile(p, smem);
      } else {
        base_tile(p, smem);
      }
    }
    release_work(all.counters, Rows::flags(p, kM));
  }

 private:
  LK_DEVICE static int shrink_columns(const Params& p) { return kColumn0 ? 0 : Rows::shrink_columns(p, kRankTile); }

  LK_DEVICE static WorkItem work_of(uint32_t smem) { return current_work(smem + kOffsetWork); }

  LK_DEVICE static int first_row(uint32_t smem, const WorkItem& work) {
    return Rows::template first_row<kM>(smem + kOffsetWork, work.row);
  }

  // Of the tile's rows: `m` is where they end.
  LK_DEVICE static decltype(auto) of_tile(const Params& p, uint32_t smem) {
    return Rows::of_tile(p, smem + kOffsetWork);
  }

  LK_DEVICE static uint32_t* flag_of(const Params& p, const WorkItem& work) {
    return Rows::all(p).counters + kFirstFlag + Rows::flag(p, work);
  }

  LK_DEVICE static void shrink_tile(const Params& params, uint32_t smem) {
    const LoraLinearParams& p = of_tile(params, smem);
    const int rank = Rows::rank(params, smem + kOffsetWork);
    const WorkItem work = work_of(smem);
    const int row0 = first_row(smem, work), column0 = work.column * kRankTile;
    const Operand x{p.x, p.x_stride, p.m, p.k}, a{p.a, p.a_stride, rank, p.k};
    typename Shrink::Accumulator acc = {};
    const auto run = [&](auto&& task) {
      with_adapter_chunk<Element, is_a_whole(kAccess, Roles::kFactors)>(p.adapters_are_float, [&](auto chunk) {
        Shrink::template run<Chunk, decltype(chunk)>(smem, x, row0, a, column0, 0, p.k, acc, task);
      });
    };
    const float scale = ShrinkSide::with_task(p, smem + kOffsetAfterStages, row0, run);
    sync_block();  // the stages are free
    stage_accumulators<Shrink>(smem, [&](int mi, int ni, int i, int) { return scale * acc[mi][ni][i]; });
    sync_block();
    store_tile<Element, kM, kRankTile, kThreads>(smem, p.s, rank, p.m, rank, row0, column0, is_s_whole(kAccess));
    sync_block();
    if (thread_index() == 0) atomic_add_acquire_release(flag_of(params, work), 1);
  }

  LK_DEVICE static void base_tile(const Params& params, uint32_t smem) {
    typename Base::Accumulator acc = {};
    if constexpr (Rows::kSumsMembers) {
      sum_members(params, smem, acc);
      const WorkItem work = work_of(smem);
      epilogue<Base>(Rows::all(params), smem, first_row(smem, work), work.column * Base::kN, acc);
      return;
    }
    const auto run = [&](auto&& task) {
      const LoraLinearParams& p = of_tile(params, smem);
      const WorkItem work = work_of(smem);
      if constexpr (kOntoY) {
        // Rows of nobody have no branch, and y is not theirs.
        if (p.rank > 0) load_y<Base>(p, smem, first_row(smem, work), work.column * Base::kN, acc);
        return;
      }
      Base::template run<Chunk, Chunk>(smem, {p.x, p.x_stride, p.m, p.k}, first_row(smem, work),
                                       {p.w, p.w_stride, p.n, p.k}, work.column * Base::kN, 0, p.k, acc, task);
      sync_block();  // the stages are free
    };
    if (kColumn0 && work_of(smem).column == 0) {
      if constexpr (kColumn0) {
        const LoraLinearParams& p = Rows::all(params);
        ShrinkTask<Base, kRankTile, kAccess> shrink(p, 0, p.k);
        run(shrink);
        Branch::add_own(p, smem, 0, shrink, nullptr, acc, [&] {
          const WorkItem work = work_of(smem);
          Branch::store_s(p, smem, work.row * kM);
          sync_block();
          if (thread_index() == 0) store_release(flag_of(params, work), 1);
        });
      }
    } else {
      run(NoSideTask{});
      add_branch(params, smem, acc);
    }
    const LoraLinearParams& p = of_tile(params, smem);
    const WorkItem work = work_of(smem);
    epilogue<Base>(p, smem, first_row(smem, work), work.column * Base::kN, acc);
  }

  // With s from the shrink tiles, or from column 0.
  LK_DEVICE static void add_branch(const Params& params, uint32_t smem, typename Base::Accumulator& acc) {
    const LoraLinearParams& p = of_tile(params, smem);
    const WorkItem work = work_of(smem);
    const int tiles = kColumn0 ? 1 : ceil_div(Rows::rank(params, smem + kOffsetWork), kRankTile);
    add_branch_of(p, flag_of(params, work), tiles, work, smem, acc);
  }

  // tiles: of s, after which the flag says that it is there.
  LK_DEVICE static void add_branch_of(const LoraLinearParams& p, const uint32_t* flag, int tiles, const WorkItem& work,
                                      uint32_t smem, typename Base::Accumulator& acc) {
    const int row0 = first_row(smem, work), column0 = work.column * Base::kN;
    BranchSide::with_sum(p, smem + kOffsetAfterStages, row0, column0,
                         [&](auto sum) { Branch::add(p, smem, row0, column0, flag, tiles, acc, sum); });
  }

  // The products of all members with their weights, and then all branches.
  LK_DEVICE static void sum_members(const Params& params, uint32_t smem, typename Base::Accumulator& acc) {
    const auto operands = [&](int member) {
      const LoraLinearParams& p = params.members[member];
      return OperandPair{{p.x, p.x_stride, p.m, p.k}, {p.w, p.w_stride, p.n, p.k}};
    };
    Base::template run_parts<Chunk>(smem, params.count, operands, first_row(smem, work_of(smem)),
                                    work_of(smem).column * Base::kN, acc);
    sync_block();  // the stages are free
    const WorkItem work = work_of(smem);
    PackBranch<Base, BranchSide, kRankTile>::add(params, smem, smem + kOffsetAfterStages, flag_of(params, work),
                                                 first_row(smem, work), work.column * Base::kN, acc);
  }
};

}  // namespace lk
