// What becomes of accumulators: tiles of elements by way of shared memory, and unrounded sums of part of the depth.
#pragma once

#include "main_loop.cuh"

namespace lk {

LK_DEVICE Vec16 vec16_of(const float (&f)[4]) { return {{bits_of(f[0]), bits_of(f[1]), bits_of(f[2]), bits_of(f[3])}}; }

// Two neighbours, rounded to elements.
template <class Element>
LK_DEVICE void store_shared_pair(uint32_t address, float low, float high) {
  if constexpr (sizeof(typename Element::Storage) == 2) {
    store_shared_4(address, Element::pack(low, high));
  } else {
    store_shared_8(address, Float2{low, high});
  }
}

// Two neighbours.
template <class Element>
LK_DEVICE Float2 load_shared_pair(uint32_t address) {
  if constexpr (sizeof(typename Element::Storage) == 2) {
    const uint32_t both = load_shared_4(address);
    return {Element::low(both), Element::high(both)};
  } else {
    const uint64_t both = load_shared_8(address);
    return {float_of(static_cast<uint32_t>(both)), float_of(static_cast<uint32_t>(both >> 32))};
  }
}

// What store_shared_pair takes, to memory.
template <class Element>
LK_DEVICE void store_global_pair(typename Element::Storage* target, Float2 v) {
  if constexpr (sizeof(typename Element::Storage) == 2) {
    store_global(reinterpret_cast<uint32_t*>(target), Element::pack(v.x, v.y));
  } else {
    store_global(reinterpret_cast<Float2*>(target), v);
  }
}

// One element.
template <class Element>
LK_DEVICE void store_global_rounded(typename Element::Storage* target, float value) {
  if constexpr (sizeof(typename Element::Storage) == 2) {
    store_global(target, static_cast<typename Element::Storage>(Element::pack(value, 0.0f)));
  } else {
    store_global(reinterpret_cast<float*>(target), value);
  }
}

// The first `count` elements of a chunk, to where chunks do not begin.
template <class Storage>
LK_DEVICE void store_elements(Storage* target, const Vec16& v, int count) {
  constexpr int kPerWord = 4 / sizeof(Storage), kElements = chunk_elements(sizeof(Storage));
  if (sizeof(Storage) == 2 && count >= kElements) {  // words, and where they begin within one, a half at either end
    const bool odd = reinterpret_cast<uintptr_t>(target) % 4 != 0;
    const int skipped = odd ? 16 : 0;
    auto* const words = reinterpret_cast<uint32_t*>(target + skipped / 16);
    LK_UNROLL
    for (int j = 0; j < 3; ++j) {
      const uint64_t both = static_cast<uint64_t>(v.word[j + 1]) << 32 | v.word[j];
      store_global(words + j, static_cast<uint32_t>(both >> skipped));
    }
    if (odd) {
      store_global(target, static_cast<Storage>(v.word[0]));
      store_global(target + kElements - 1, static_cast<Storage>(v.word[3] >> 16));
    } else {
      store_global(words + 3, v.word[3]);
    }
    return;
  }
  for (int j = 0; j < kElements; ++j) {
    if (j < count) store_global(target + j, static_cast<Storage>(v.word[j / kPerWord] >> (16 * (j % kPerWord))));
  }
}

// Writes a [kRows, kColumns] tile, staged in shared memory by all threads, to rows and columns of `out` that exist.
// whole: these rows consist of chunks.
template <class Element, int kRows, int kColumns, int kThreads>
LK_DEVICE void store_tile(uint32_t smem, void* out, int64_t stride, int rows, int columns, int row0, int column0,
                          bool whole) {
  using Storage = typename Element::Storage;
  using Grid = ChunkGrid<SharedTile<kColumns, sizeof(Storage)>, kRows, kThreads>;
  const Grid grid;
  const int column = column0 + grid.column, left = rows - row0 - grid.row;
  if (column >= columns) return;
  Storage* target = static_cast<Storage*>(out) + (row0 + grid.row) * stride + column;
  const auto for_chunks = [&](const auto& store) {
    LK_UNROLL
    for (int step = 0; step < Grid::kSteps; ++step) {
      if (!Grid::has(step) || step * Grid::kRowStep >= left) break;
      store(load_shared_16(Grid::target(smem, grid.first_target, step)));
      target += Grid::kRowStep * stride;
    }
  };
  if (whole) {
    for_chunks([&](const Vec16& v) { store_global(reinterpret_cast<Vec16*>(target), v); });
  } else {
    for_chunks([&](const Vec16& v) { store_elements(target, v, columns - column); });
  }
}

// Stages value(mi, ni, i, column) of every accumulator element in shared memory, as a [kM, kN] tile of elements.
template <MainLoop Loop, class Value>
LK_DEVICE void stage_accumulators(uint32_t smem, const Value& value) {
  using Element = typename Loop::Element;
  using Out = SharedTile<Loop::kN, sizeof(typename Element::Storage)>;
  const int lane = thread_index() % kWarp;
  LK_UNROLL
  for (int mi = 0; mi < Loop::kFragmentsM; ++mi) {
    LK_UNROLL
    for (int ni = 0; ni < Loop::kFragmentsN; ++ni) {
      LK_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = Loop::warp_row() + mi * 16 + half * 8 + FragmentC::row(lane);
        const int column = Loop::warp_column() + ni * 8 + FragmentC::column(lane);
        store_shared_pair<Element>(smem + Out::element_offset(row, column), value(mi, ni, half * 2, column),
                                   value(mi, ni, half * 2 + 1, column + 1));
      }
    }
  }
}

// Unrounded sums of part of the depth, in memory: kPartial floats, each thread's where it alone looks for them.
template <MainLoop Loop>
constexpr int kPartial = Loop::kM * Loop::kN;

template <MainLoop Loop>
LK_DEVICE Vec16* place_in_partial(float* partial, int mi, int ni) {
  return reinterpret_cast<Vec16*>(partial) + (mi * Loop::kFragmentsN + ni) * Loop::kThreads + thread_index();
}

template <MainLoop Loop>
LK_DEVICE void store_partial(float* partial, const typename Loop::Accumulator& acc) {
  LK_UNROLL
  for (int mi = 0; mi < Loop::kFragmentsM; ++mi) {
    LK_UNROLL
    for (int ni = 0; ni < Loop::kFragmentsN; ++ni) {
      store_global(place_in_partial<Loop>(partial, mi, ni), vec16_of(acc[mi][ni]));
    }
  }
}

// acc = the sum of `count` partials that follow each other, always in the same order. The loads of a row of fragments
// are under way together: of all there would be too few registers.
template <MainLoop Loop>
LK_DEVICE void sum_partials(float* partials, int count, typename Loop::Accumulator& acc) {
  LK_UNROLL
  for (int mi = 0; mi < Loop::kFragmentsM; ++mi) {
    LK_UNROLL
    for (auto& fragment : acc[mi]) {
      LK_UNROLL
      for (float& sum : fragment) sum = 0.0f;
    }
    LK_NO_UNROLL
    for (int i = 0; i < count; ++i) {
      LK_UNROLL
      for (int ni = 0; ni < Loop::kFragmentsN; ++ni) {
        const Vec16 part = load_global(place_in_partial<Loop>(partials + i * kPartial<Loop>, mi, ni));
        LK_UNROLL
        for (int j = 0; j < 4; ++j) acc[mi][ni][j] += float_of(part.word[j]);
      }
    }
  }
}

}  // namespace lk
