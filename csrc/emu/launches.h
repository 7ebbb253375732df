// What the emulated launches of all ops have in common: the options that tests set, and what a launch may touch.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "../device.h"
#include "../params/common.h"

namespace lk {

inline emu::Options options;

inline size_t size_of(FloatType type) { return type == FloatType::kFloat32 ? 4 : 2; }

// What a launch may touch. Outputs become NaN, -1 or true.
class Memory {
 public:
  // `rows` rows of `columns` elements.
  void input(const void* data, size_t element, int64_t rows, int64_t columns, int64_t stride) {
    if (data != nullptr && rows > 0 && columns > 0) ranges.push_back({data, ((rows - 1) * stride + columns) * element});
  }
  void output(void* data, size_t bytes) {
    if (data == nullptr || bytes == 0) return;
    std::memset(data, 0xFF, bytes);
    ranges.push_back({data, bytes});
  }

  std::vector<emu::Range> ranges;
};

template <class Variant, class Params>
emu::Report emulate(void (*kernel)(Params), int64_t blocks, const Params& p, const Memory& memory) {
  return emu::launch(static_cast<int>(blocks), Variant::kThreads, Variant::kSharedBytes, memory.ranges, options,
                     [&] { kernel(p); });
}

}  // namespace lk
