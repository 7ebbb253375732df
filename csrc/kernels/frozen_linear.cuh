// y = x wᵀ + bias with the main loop of lora_linear and without its branch: the floor that benchmarks divide by.
#pragma once

#include "lora_linear.cuh"

namespace lk {

template <class Base_, bool kAligned_>
struct FrozenLinear {
  using Base = Base_;
  static constexpr bool kAligned = kAligned_;
  static constexpr int kThreads = Base::kThreads, kMinBlocks = kThreads <= 128 ? 2 : 1;
  static constexpr int kSharedBytes = larger(Base::kSharedBytes, Base::kBytesResult);

  LK_DEVICE static void run(const LoraLinearParams& p) {
    const uint32_t smem = dynamic_shared();
    const WorkItem work =
        work_of_ticket(block_index(), ceil_div(p.m, Base::kM), 0, ceil_div(p.n, Base::kN), p.group_rows);
    const int row0 = work.row * Base::kM, column0 = work.column * Base::kN;
    typename Base::Accumulator acc = {};
    Base::template run<kAligned>(smem, {p.x, p.x_stride, p.m, p.k}, row0, {p.w, p.w_stride, p.n, p.k}, column0, 0, p.k,
                                 acc, Alone{});
    store_result<Base, kAligned>(p, smem, row0, column0, acc);
  }
};

}  // namespace lk
