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

// The same to memory.
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

// Writes a [kRows, kColumns] tile, staged in shared memory by all threads, to rows and columns of `out` that exist.
// whole: these rows consist of chunks.
template <class Element, int kRows, int kColumns, int kThreads>
LK_DEVICE void store_tile(uint32_t smem, void* out, int64_t stride, int rows, int columns, int row0, int column0,
                          bool whole) {
  using Storage = typename Element::Storage;
  using Tile = SharedTile<kColumns, sizeof(Storage)>;
  constexpr int kTotal = kRows * Tile::kChunks, kPerWord = 4 / sizeof(Storage);
  for (int i = thread_index(); i < kTotal; i += kThreads) {
    const int row = i / Tile::kChunks, chunk = i % Tile::kChunks, column = column0 + chunk * Tile::kChunkElements;
    if (row0 + row >= rows || column >= columns) continue;
    const Vec16 v = load_shared_16(smem + Tile::offset(row, chunk));
    Storage* target = static_cast<Storage*>(out) + (row0 + row) * stride + column;
    if (whole) {
      store_global(reinterpret_cast<Vec16*>(target), v);
    } else {
      for (int j = 0; j < Tile::kChunkElements; ++j) {
        const uint32_t bits = v.word[j / kPerWord] >> (16 * (j % kPerWord));
        if (column + j < columns) store_global(target + j, static_cast<Storage>(bits));
      }
    }
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

// acc = the sum of `count` partials that follow each other, always in the same order.
template <MainLoop Loop>
LK_DEVICE void sum_partials(float* partials, int count, typename Loop::Accumulator& acc) {
  LK_UNROLL
  for (int mi = 0; mi < Loop::kFragmentsM; ++mi) {
    LK_UNROLL
    for (int ni = 0; ni < Loop::kFragmentsN; ++ni) {
      LK_UNROLL
      for (int j = 0; j < 4; ++j) acc[mi][ni][j] = 0.0f;
      for (int i = 0; i < count; ++i) {
        const Vec16 part = load_global(place_in_partial<Loop>(partials + i * kPartial<Loop>, mi, ni));
        LK_UNROLL
        for (int j = 0; j < 4; ++j) acc[mi][ni][j] += float_of(part.word[j]);
      }
    }
  }
}

}  // namespace lk
