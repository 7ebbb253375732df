// Counting over a block, in the order of the threads.
#pragma once

#include "../device.h"

namespace lk {

// Takes kItems flags per thread and call; flag i of thread t is number i * kThreads + t. All threads call it. Calls use
// two parts of the shared memory in turn, so that one barrier each is enough: when a part is written again, the barrier
// of the call between has been passed by whoever read it.
template <int kThreads>
class BlockScan {
 public:
  static constexpr int kItems = 4, kFlags = kItems * kThreads;
  using Flags = bool[kItems];

 private:
  static constexpr int kWarps = kThreads / 32, kPartBytes = kItems * kWarps * 4;
  static_assert(kWarps % 4 == 0, "words are read four at a time");

 public:
  static constexpr int kSharedBytes = 2 * kPartBytes;

  LK_DEVICE explicit BlockScan(uint32_t smem) : part_(smem), other_part_(smem + kPartBytes) {}

  // before[i]: the flags in front of this thread's i-th. Returns how many there are in all.
  LK_DEVICE int count(const Flags& flag, int (&before)[kItems]) {
    const uint32_t counts_smem = next_part();
    uint32_t lanes[kItems];
    LK_UNROLL
    for (int i = 0; i < kItems; ++i) {
      lanes[i] = warp_ballot(flag[i]);
      if (lane() == 0) store_shared_4(counts_smem + (i * kWarps + warp()) * 4, count_ones(lanes[i]));
    }
    sync_block();
    int total = 0;
    LK_UNROLL
    for (int i = 0; i < kItems; ++i) {
      before[i] = total + static_cast<int>(count_ones(lanes[i] & ((1u << lane()) - 1)));
      LK_UNROLL
      for (int first = 0; first < kWarps; first += 4) {
        const Vec16 counts = load_shared_16(counts_smem + (i * kWarps + first) * 4);
        LK_UNROLL
        for (int j = 0; j < 4; ++j) {
          if (first + j < warp()) before[i] += static_cast<int>(counts.word[j]);
          total += static_cast<int>(counts.word[j]);
        }
      }
    }
    return total;
  }

  // The number of the first flag that is set; kFlags if none is.
  LK_DEVICE int first(const Flags& flag) {
    const uint32_t firsts_smem = next_part();
    int first = kFlags;
    LK_UNROLL
    for (int i = kItems - 1; i >= 0; --i) {
      const uint32_t lanes = warp_ballot(flag[i]);
      const int lowest = static_cast<int>(count_ones((lanes & (0u - lanes)) - 1));
      if (lanes != 0) first = i * kThreads + warp() * 32 + lowest;
    }
    if (lane() == 0) store_shared_4(firsts_smem + warp() * 4, static_cast<uint32_t>(first));
    sync_block();
    LK_UNROLL
    for (int at = 0; at < kWarps; at += 4) {
      const Vec16 firsts = load_shared_16(firsts_smem + at * 4);
      LK_UNROLL
      for (int j = 0; j < 4; ++j) {
        if (static_cast<int>(firsts.word[j]) < first) first = static_cast<int>(firsts.word[j]);
      }
    }
    return first;
  }

 private:
  LK_DEVICE static int lane() { return thread_index() % 32; }
  LK_DEVICE static int warp() { return thread_index() / 32; }

  LK_DEVICE uint32_t next_part() {
    const uint32_t part = part_;
    part_ = other_part_;
    other_part_ = part;
    return part;
  }

  uint32_t part_, other_part_;
};

}  // namespace lk
