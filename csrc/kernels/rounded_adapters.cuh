// Adapters of fp32 under 16-bit products, for an engine that copies and converts nothing: rounded at the beginning of
// the launch, into workspace, by warps that would be idle. PEFT keeps adapters so.
#pragma once

#include "../device_sm90.h"
#include "../formats/float32.h"
#include "../params/lora_linear_wgmma.h"
#include "between_blocks.cuh"

namespace lk {

template <class Element>
class RoundedAdapters {
  using Format = Float32Format<Element>;
  static constexpr int kChunksOfLane = 4, kChunksOfTicket = kChunksOfLane * kWarp;

 public:
  // row_blocks: flags in front of the counters that this has.
  LK_DEVICE RoundedAdapters(const LoraWgmmaParams& p, int row_blocks)
      : p_(p), tickets_(p.lora.counters + kFirstFlag + row_blocks) {}

  // A warp's share.
  LK_DEVICE void make() const {
    if (!are_wanted()) return;
    const int lane = thread_index() % kWarp, count = ticket_count(), of_a = chunks(p_.rounded_a);
    LK_NO_UNROLL
    for (;;) {
      const int ticket = static_cast<int>(broadcast(lane == 0 ? atomic_add(tickets_, 1) : 0));
      if (ticket >= count) return;
      LK_NO_UNROLL
      for (int i = 0; i < kChunksOfLane; ++i) {
        const int chunk = ticket * kChunksOfTicket + i * kWarp + lane;
        if (chunk < of_a) {
          round(p_.rounded_a, chunk);
        } else if (chunk < of_a + chunks(p_.rounded_b)) {
          round(p_.rounded_b, chunk - of_a);
        }
      }
      fence_proxy_async();  // the copy engine reads them
      sync_warp();
      if (lane == 0) atomic_add_acquire_release(done(), 1);
    }
  }

  // Until all are there, for this thread and the engines that it tells. It waits for tickets that somebody has drawn,
  // or that its own block's warps are about to.
  LK_DEVICE void wait() const {
    if (!are_wanted()) return;
    while (load_acquire(done()) != static_cast<uint32_t>(ticket_count())) pause();
    fence_proxy_async();
  }

 private:
  LK_DEVICE bool are_wanted() const { return p_.rounded_a.from != nullptr; }
  LK_DEVICE uint32_t* done() const { return tickets_ + 1; }
  LK_DEVICE int ticket_count() const { return ceil_div(chunks(p_.rounded_a) + chunks(p_.rounded_b), kChunksOfTicket); }

  LK_DEVICE static int chunks(const RoundedMatrix& m) { return m.rows * (m.columns / Format::kChunkElements); }

  LK_DEVICE static void round(const RoundedMatrix& m, int chunk) {
    const int of_row = m.columns / Format::kChunkElements;
    const float* const from = m.from + chunk / of_row * m.stride + chunk % of_row * Format::kChunkElements;
    store_global(static_cast<Vec16*>(m.to) + chunk,
                 Format::template decode<true>(reinterpret_cast<const unsigned char*>(from), Format::kChunkElements));
  }

  const LoraWgmmaParams& p_;
  uint32_t* const tickets_;
};

}  // namespace lk
