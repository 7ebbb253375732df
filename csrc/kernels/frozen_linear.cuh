// y = x wᵀ + bias with the main loop of lora_linear and without its branch. A yardstick of the tests, which run it in
// the emulator and compare its machine code with lora_linear's. No op is served by it, and it is not in the module.
#pragma once

#include "lora_linear_variants.cuh"

namespace lk {

template <class Base_>
struct FrozenLinear {
  using Base = Base_;
  using Element = typename Base::Element;
  static constexpr Access kAccess = Access::kWhole;
  static constexpr int kThreads = Base::kThreads, kMinBlocks = kThreads <= 128 ? 2 : 1;
  static constexpr int kSharedBytes = larger(Base::kSharedBytes, Base::kBytesResult);

  LK_DEVICE static void run(const LoraLinearParams& p) {
    const uint32_t smem = dynamic_shared();
    const WorkItem work =
        work_of_ticket(block_index(), ceil_div(p.m, Base::kM), 0, ceil_div(p.n, Base::kN), p.group_rows);
    const int row0 = work.row * Base::kM, column0 = work.column * Base::kN;
    typename Base::Accumulator acc = {};
    using Chunk = PlainChunk<Element, is_base_whole(kAccess)>;
    Base::template run<Chunk, Chunk>(smem, {p.x, p.x_stride, p.m, p.k}, row0, {p.w, p.w_stride, p.n, p.k}, column0, 0,
                                     p.k, acc, NoSideTask{});
    epilogue<Base>(p, smem, row0, column0, acc);
  }
};

inline LoraLinearConfig frozen_linear_config(int64_t m, int64_t n, const DeviceLimits& device) {
  LoraLinearConfig config{};
  config.splits = 1;
  config.key.tile = choose_tile(m, n, device, config.tile_reason);
  config.key.schedule = Schedule::kColumn0;  // no tiles of s
  plan_tickets(m, n, 0, config);
  config.counters = 0;
  return config;
}

template <class Element>
using FrozenVariants =
    VariantList<Variant<forward_key(Schedule::kColumn0, LoraTile::kLarge, 0),
                        FrozenLinear<LargeTile<Element, kFewestWarpsN<Element>>>>,
                Variant<forward_key(Schedule::kColumn0, LoraTile::kSmall, 0), FrozenLinear<SmallTile<Element>>>>;

}  // namespace lk
