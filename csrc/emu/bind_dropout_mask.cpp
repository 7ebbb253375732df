// The CUDA binding of dropout_mask as it is, over CPU tensors and emulated launches: an op of
// `lora_kernels_emulated_mask`. Also the mask as other kernels apply it to a tile, and `usable`. Test only.
#include "../kernels/dropout.cuh"
#include "../kernels/dropout_mask.cuh"
#include "../launch/dropout_mask.h"
#include "../launch/usable.h"
#include "../params/lora_linear.h"
#include "launch_over_torch.h"

namespace lk {

struct DropoutMaskVariant {
  static constexpr int kThreads = kDropoutMaskThreads, kSharedBytes = 0;
};

cudaError_t launch_dropout_mask(const DropoutMaskParams& p, cudaStream_t stream) {
  const int64_t blocks = dropout_mask_blocks(p, 3);
  if (blocks == 0) return cudaSuccess;
  Memory memory;
  memory.input(p.seed, sizeof *p.seed, 1, 1, 0);
  memory.output(p.keep, p.rows * p.columns);
  return run<DropoutMaskVariant>(&dropout_mask_kernel, true, blocks, p, memory, stream);
}

namespace {

cudaError_t answer = cudaSuccess;

namespace py = pybind11;

constexpr int kTileRows = 16, kTileColumns = 32, kTileThreads = 64;

// A byte per element of the tile at (row0, column0) of a matrix with so many columns: 1 is kept. By drop_tile on
// elements of this size, which are all ones before, and by KeepBits.
template <int kElementBytes>
py::tuple kept_in_tile(int64_t seed, uint32_t threshold, int columns, int row0, int column0) {
  using Tile = SharedTile<kTileColumns, kElementBytes>;
  using Keep = KeepBits<kTileRows, kTileColumns>;
  constexpr int kBytes = Tile::bytes(kTileRows), kElements = kTileRows * kTileColumns;
  std::vector<uint8_t> elements(kElements), bits(kElements);
  const std::vector<emu::Range> memory{{&seed, sizeof seed}, {elements.data(), kElements}, {bits.data(), kElements}};
  emu::launch(1, kTileThreads, kBytes + Keep::kBytes, memory, options, [&] {
    const uint32_t tile = dynamic_shared(), words = tile + kBytes;
    for (int i = thread_index(); i < kBytes / kChunkBytes; i += kTileThreads) {
      store_shared_16(tile + i * kChunkBytes, {{~0u, ~0u, ~0u, ~0u}});
    }
    sync_block();
    LoraLinearParams p{};
    p.seed = &seed;
    p.dropout_threshold = threshold;
    const DropoutMask mask(p, columns);
    drop_tile<Tile, kTileRows, kTileThreads>(tile, NextRows{row0}, column0, mask);
    Keep::template compute<kTileThreads>(words, NextRows{row0}, column0, mask);
    sync_block();
    for (int i = thread_index(); i < kElements; i += kTileThreads) {
      const int row = i / kTileColumns, column = i % kTileColumns;
      const uint32_t offset = Tile::element_offset(row, column);
      const uint32_t element = load_shared_4(tile + offset / 4 * 4) >> (offset % 4 * 8);
      store_global(&elements[i], static_cast<uint8_t>(element & 1));
      store_global(&bits[i], static_cast<uint8_t>(Keep::word(words, row, column) >> column % 32 & 1));
    }
  });
  const auto bytes_of = [](const std::vector<uint8_t>& v) {
    return py::bytes(reinterpret_cast<const char*>(v.data()), v.size());
  };
  return py::make_tuple(bytes_of(elements), bytes_of(bits));
}

}  // namespace

cudaError_t find_dropout_mask_kernel() { return emu::runtime.last_error = answer; }

}  // namespace lk

#define CUDA CPU
#define lora_kernels_native lora_kernels_emulated_mask
#include "../bind/dropout_mask_cuda.cpp"
#undef CUDA

PYBIND11_MODULE(_emu_dropout_mask, m) {
  lk::define_launch(m);
  m.def("kept_in_tile_16", &lk::kept_in_tile<2>);
  m.def("kept_in_tile_32", &lk::kept_in_tile<4>);
  // When this number is what CUDA answers.
  m.def("usable", [](int error) {
    lk::answer = static_cast<cudaError_t>(error);
    const lk::Usability usability = lk::usability();
    return pybind11::make_tuple(usability.problem, usability.detail);
  });
  m.def("last_error", [] { return static_cast<int>(cudaGetLastError()); });
}
