// Which rows of a launch are one problem: all of them, or those of a group, as an operand of the launch says.
//
// Where groups end is known on the device alone. So blocks of rows are numbered by shapes: a group that begins in row
// `first` has the numbers from first / rows + (its own number) on. They are enough, since no block of another group
// begins there, and rise with the groups; a number too many has no rows, and its tiles nothing to do.
#pragma once

#include "../config/grouped_lora_linear.h"
#include "../params/grouped_lora_linear.h"
#include "../tile.h"

namespace lk {

// A block of rows [first, ...) of a group's [group_first, end).
struct GroupRows {
  int group, group_first, first, end;
};

// Where a group begins; whatever the ends are, within the rows that there are.
LK_DEVICE int first_row_of_group(const RowGroups& groups, int m, int group) {
  const int end = group == 0 ? 0 : load_global(groups.ends + group - 1);
  return smaller(larger(end, 0), m);
}

// Rows of the block with this number, none where first >= end; of `count` groups, the last of which may be what
// belongs to nobody. All lanes of a warp call it.
LK_DEVICE GroupRows rows_of_block(const RowGroups& groups, int count, int m, int block, int rows) {
  int group = -1;
  LK_NO_UNROLL
  for (int some = 0; some < count; some += kWarp) {
    const int g = some + thread_index() % kWarp;
    const bool begins = g < count && first_row_of_group(groups, m, g) / rows + g <= block;
    group += static_cast<int>(count_ones(warp_ballot(begins)));
  }
  const int group_first = first_row_of_group(groups, m, group);
  const int end = group < groups.count ? first_row_of_group(groups, m, group + 1) : m;
  return {group, group_first, group_first + (block - group_first / rows - group) * rows, end};
}

LK_DEVICE const void* bytes_behind(const void* p, int64_t bytes) { return static_cast<const char*>(p) + bytes; }

// All rows are one problem.
struct OneGroup {
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
struct ManyGroups {
  using Params = GroupedLoraLinearParams;
  static constexpr int kBytes = 16;

  LK_DEVICE static const LoraLinearParams& all(const Params& p) { return p.lora; }
  LK_DEVICE static int row_blocks(const Params& p, int) { return p.row_blocks; }

  // Whether there are rows with this number. All threads call it.
  template <int kRows>
  LK_DEVICE static bool find(const Params& p, uint32_t smem, int row_block) {
    if (thread_index() < kWarp) {
      const GroupRows rows = rows_of_block(p.groups, p.groups.count + 1, p.lora.m, row_block, kRows);
      if (thread_index() == 0) {
        store_shared_16(smem, {{static_cast<uint32_t>(rows.group), static_cast<uint32_t>(rows.first),
                                static_cast<uint32_t>(rows.end)}});
      }
    }
    sync_block();
    const Vec16 rows = load_shared_16(smem);
    return static_cast<int>(rows.word[1]) < static_cast<int>(rows.word[2]);
  }

  template <int kRows>
  LK_DEVICE static int first_row(uint32_t smem, int) {
    return static_cast<int>(load_shared_4(smem + 4));
  }

  // Rows of nobody are multiplied by nothing.
  LK_DEVICE static LoraLinearParams of_tile(const Params& p, uint32_t smem) {
    const Vec16 rows = load_shared_16(smem);
    const int group = static_cast<int>(rows.word[0]);
    LoraLinearParams one = p.lora;
    one.w = bytes_behind(one.w, group * p.w_step);
    one.a = bytes_behind(one.a, group * p.a_step);
    one.b = bytes_behind(one.b, group * p.b_step);
    if (one.bias != nullptr) one.bias = bytes_behind(one.bias, group * p.bias_step);
    one.m = static_cast<int>(rows.word[2]);
    if (group == p.groups.count) {
      one.k = one.rank = 0;
      one.bias = nullptr;
    }
    return one;
  }
};

}  // namespace lk
