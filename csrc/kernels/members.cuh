// Which columns of a launch are one problem: all of them (OneMember, row_groups.cuh), or those of a member of a pack.
//
// The tiles of a block of rows enumerate members: first those of everybody's s, then those of y. Of the gradient of x
// there is one y, whose tiles sum over members.
#pragma once

#include "../params/lora_pack.h"
#include "between_blocks.cuh"

namespace lk {

template <bool kSums>
struct Members {
  using Params = LoraPackParams;
  static constexpr int kBytes = 0;
  static constexpr bool kSumsMembers = kSums;

  // For what is the same in all.
  LK_DEVICE static const LoraLinearParams& all(const Params& p) { return p.members[0]; }
  LK_DEVICE static int row_blocks(const Params& p, int rows) { return ceil_div(all(p).m, rows); }
  template <int kRows>
  LK_DEVICE static bool find(const Params&, uint32_t, int) {
    return true;
  }
  template <int kRows>
  LK_DEVICE static int first_row(uint32_t, int row_block) {
    return row_block * kRows;
  }
  LK_DEVICE static const LoraLinearParams& of_tile(const Params& p, uint32_t smem) {
    return p.members[current_work(smem).member];
  }

  LK_DEVICE static int shrink_columns(const Params& p, int) { return p.shrink_columns; }
  LK_DEVICE static int base_columns(const Params& p, int) { return p.base_columns; }

  // The work of a tile of all members, as its member's.
  LK_DEVICE static WorkItem of_member(const Params& p, WorkItem work, int rank_tile, int tile) {
    if (kSums && !work.is_shrink) return work;
    while (true) {
      const LoraLinearParams& member = p.members[work.member];
      const int columns = work.is_shrink ? ceil_div(member.rank, rank_tile) : ceil_div(member.n, tile);
      if (work.column < columns) return work;
      work.column -= columns;
      ++work.member;
    }
  }

  LK_DEVICE static int rank(const Params& p, uint32_t smem) { return of_tile(p, smem).rank; }
  LK_DEVICE static int flags(const Params& p, int rows) { return row_blocks(p, rows) * p.count; }
  LK_DEVICE static int flag(const Params& p, const WorkItem& work) { return work.row * p.count + work.member; }
};

}  // namespace lk
