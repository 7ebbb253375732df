// Which rows of a launch are one problem: all of them, or those of a group, as an operand of the launch says.
//
// Where groups end is known on the device alone. So blocks of rows are numbered by shapes: a group that begins in row
// `first` has the numbers from first / rows + (how many groups are in front of it) on. They are enough, since a block
// of rows ends where a group does, and rise with the groups; a number too many has no rows, and its tiles nothing to
// do.
#pragma once

#include "../config/grouped_lora_linear.h"
#include "../params/grouped_lora_linear.h"
#include "between_blocks.cuh"

namespace lk {

// Where a group begins; whatever the ends are, within the rows that there are.
LK_DEVICE int first_row_of_group(const RowGroups& groups, int m, int group) {
  const int end = group == 0 ? 0 : load_global(groups.ends + group - 1);
  return smaller(larger(end, 0), m);
}

// A block of rows [first, ...) of a group's [group_first, end).
struct GroupRows {
  int group, group_first, first, end;
};

constexpr int kBytesGroupRows = 16;
LK_DEVICE GroupRows load_group_rows(uint32_t smem) {
  const Vec16 v = load_shared_16(smem);
  return {static_cast<int>(v.word[0]), static_cast<int>(v.word[1]), static_cast<int>(v.word[2]),
          static_cast<int>(v.word[3])};
}

// Of the block with this number; none where first >= end. kAll: groups without rows count, too, but what is behind them
// does not. All threads of a block call it; load_group_rows(smem) then finds them again.
template <bool kAll>
LK_DEVICE GroupRows find_group_rows(const RowGroups& groups, int m, int block, int rows, uint32_t smem) {
  const int lane = thread_index();
  if (lane < kWarp) {
    const int count = kAll ? groups.count : groups.count + 1;
    int in_front = 0;
    LK_NO_UNROLL
    for (int some = 0; some < count; some += kWarp) {
      const int group = some + lane;
      const int first = group < count ? first_row_of_group(groups, m, group) : m;
      const int end = group < groups.count ? first_row_of_group(groups, m, group + 1) : m;
      const bool counts = kAll ? group < count : first < end;
      const uint32_t counted = warp_ballot(counts);
      const int number = first / rows + in_front + static_cast<int>(count_ones(counted & ((1u << lane) - 1)));
      const bool begins = counts && number <= block;
      if (warp_ballot(begins) >> lane == 1) {  // the last of those that begin here or in front of here
        store_shared_16(smem, {{static_cast<uint32_t>(group), static_cast<uint32_t>(first),
                                static_cast<uint32_t>(first + (block - number) * rows), static_cast<uint32_t>(end)}});
      }
      sync_warp();
      in_front += static_cast<int>(count_ones(counted));
    }
  }
  sync_block();
  return load_group_rows(smem);
}

LK_DEVICE const void* bytes_behind(const void* p, int64_t bytes) { return static_cast<const char*>(p) + bytes; }

// What LoraLinear asks of its rows: the parameters of the launch, how many blocks of rows there are, whether one of
// them has rows (find) and which, and the parameters of a tile's own problem, whose `m` is where its rows end. And of
// its columns (members.cuh): how many tiles there are of them in a block of rows, and flags; which a tile's are.
// `smem`: of the block's work, with kBytes behind it.
//
// Columns of one weight.
template <class Rows>
struct OneMember {
  static constexpr bool kSumsMembers = false;

  LK_DEVICE static int shrink_columns(const auto& p, int tile) { return ceil_div(Rows::all(p).rank, tile); }
  LK_DEVICE static int base_columns(const auto& p, int tile) { return ceil_div(Rows::all(p).n, tile); }
  LK_DEVICE static WorkItem of_member(const auto&, const WorkItem& work, int, int) { return work; }
  LK_DEVICE static int rank(const auto& p, uint32_t) { return Rows::all(p).rank; }
  LK_DEVICE static int flags(const auto& p, int rows) { return Rows::row_blocks(p, rows); }
  LK_DEVICE static int flag(const auto&, const WorkItem& work) { return work.row; }
};

// All rows are one problem.
struct OneGroup : OneMember<OneGroup> {
  using Params = LoraLinearParams;
  static constexpr int kBytes = 0;

  LK_DEVICE static const LoraLinearParams& all(const Params& p) { return p; }
  LK_DEVICE static int row_blocks(const Params& p, int rows) { return ceil_div(p.m, rows); }
  template <int kRows>
  LK_DEVICE static bool find(const Params&, uint32_t, int) {
    return true;
  }
  template <int kRows>
  LK_DEVICE static int first_row(uint32_t, int row_block) {
    return row_block * kRows;
  }
  LK_DEVICE static const LoraLinearParams& of_tile(const Params& p, uint32_t) { return p; }
};

// Each group is one. The block's lies in shared memory and is read where it is needed, as its work is.
struct ManyGroups : OneMember<ManyGroups> {
  using Params = GroupedLoraLinearParams;
  static constexpr int kBytes = kBytesGroupRows;

  LK_DEVICE static const LoraLinearParams& all(const Params& p) { return p.lora; }
  LK_DEVICE static int row_blocks(const Params& p, int) { return p.row_blocks; }

  template <int kRows>
  LK_DEVICE static bool find(const Params& p, uint32_t smem, int row_block) {
    const GroupRows rows = find_group_rows<false>(p.groups, p.lora.m, row_block, kRows, smem + kBytesWork);
    return rows.first < rows.end;
  }

  template <int kRows>
  LK_DEVICE static int first_row(uint32_t smem, int) {
    return load_group_rows(smem + kBytesWork).first;
  }

  // Rows of nobody are multiplied by nothing.
  LK_DEVICE static LoraLinearParams of_tile(const Params& p, uint32_t smem) {
    const auto [group, group_first, first, end] = load_group_rows(smem + kBytesWork);
    LoraLinearParams one = p.lora;
    one.w = bytes_behind(one.w, group * p.w_step);
    one.a = bytes_behind(one.a, group * p.a_step);
    one.b = bytes_behind(one.b, group * p.b_step);
    if (one.bias != nullptr) one.bias = bytes_behind(one.bias, group * p.bias_step);
    one.m = end;
    if (group == p.groups.count) {
      one.k = one.rank = 0;
      one.bias = nullptr;
    }
    return one;
  }
};

}  // namespace lk
