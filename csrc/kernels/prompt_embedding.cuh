// A trainable prompt put into token embeddings, with the columns beside it, in one launch.
//
// The first blocks write the columns of one sample each: attention mask, position ids, labels, layout. The others copy
// rows, a warp a row. No block waits for another: each finds out from the mask where its sample's prompt goes.
#pragma once

#include "../config/prompt_embedding.h"
#include "block_scan.cuh"
#include "prompt_rows.cuh"

namespace lk {

template <class Element_, bool kAligned_>
struct PromptEmbedding {
  using Element = Element_;
  static constexpr bool kAligned = kAligned_;
  static constexpr int kThreads = kPromptThreads, kMinBlocks = 4;
  using Scan = BlockScan<kThreads>;
  static constexpr int kSharedBytes = Scan::kSharedBytes;

  LK_DEVICE static void run(const PromptEmbeddingParams& p) {
    const int batch = static_cast<int>(p.sizes.batch);
    Scan scan(dynamic_shared());
    if (block_index() < batch) {
      write_columns(p, block_index(), scan);
    } else {
      const int block = block_index() - batch;
      const int blocks = static_cast<int>(blocks_of(p.sizes.prompt_rows + p.sizes.tokens, p.rows_per_block));
      write_rows(p, block / blocks, block % blocks * p.rows_per_block, scan);
    }
  }

 private:
  using Bits = typename Elements<Element>::Bits;
  using Unit = typename CopyUnit<Bits, kAligned>::Type;
  static constexpr int kItems = Scan::kItems, kGroup = prompt_group(kAligned);

  // ------------------------------------------------------------------------------------------------- layout

  // Where the prompt of sample b goes, as far as rows below `rows` tell: the search for a real token ends there.
  LK_DEVICE static Place place_of(const PromptEmbeddingParams& p, int b, int rows, Scan& scan) {
    const int prompt_rows = static_cast<int>(p.sizes.prompt_rows), tokens = static_cast<int>(p.sizes.tokens);
    const int length = length_at(p.prompt_lengths, b, prompt_rows, p.trap_outside);
    if (!p.left) return {0, 0, length};
    const int first = prompt_rows - length;
    return {first,
            p.mask.tokens == nullptr ? 0 : first_real_token(p, b, smaller(tokens, larger(rows - first, 0)), scan),
            length};
  }

  // Of tokens [0, end); `end` if none is real.
  LK_DEVICE static int first_real_token(const PromptEmbeddingParams& p, int b, int end, Scan& scan) {
    LK_NO_UNROLL
    for (int from = 0; from < end; from += Scan::kFlags) {
      bool is_real[kItems];
      LK_UNROLL
      for (int i = 0; i < kItems; ++i) {
        const int t = from + i * kThreads + thread_index();
        is_real[i] = t < end && (token_bits(p, p.mask, b, t) & p.mask_significant) != 0;
      }
      const int first = scan.first(is_real);
      if (first < Scan::kFlags) return from + first;
    }
    return end;
  }

  // ------------------------------------------------------------------------------------------------ columns

  LK_DEVICE static void write_columns(const PromptEmbeddingParams& p, int b, Scan& scan) {
    const int tokens = static_cast<int>(p.sizes.tokens), rows = static_cast<int>(p.sizes.prompt_rows) + tokens;
    const Place place = place_of(p, b, rows, scan);
    store_layout(p.layout + b, place);
    int real = 0;  // rows in front of `from` that are
    LK_NO_UNROLL
    for (int from = 0; from < rows; from += Scan::kFlags) {
      uint64_t bits[kItems];
      if (p.labels.out != nullptr) write_column(p, p.labels, b, place, from, bits);
      write_column(p, p.mask, b, place, from, bits);
      bool is_real[kItems];
      LK_UNROLL
      for (int i = 0; i < kItems; ++i) is_real[i] = (bits[i] & p.mask_significant) != 0;
      int before[kItems];
      const int real_here = scan.count(is_real, before);
      LK_UNROLL
      for (int i = 0; i < kItems; ++i) {
        const int r = from + i * kThreads + thread_index();
        if (r >= rows) continue;
        store_global(p.positions + static_cast<int64_t>(b) * rows + r,
                     int64_t{larger(real + before[i] + (is_real[i] ? 1 : 0) - 1, 0)});
      }
      real += real_here;
    }
  }

  // This thread's rows from `from` on; their elements remain in `bits`, zero behind the last row.
  LK_DEVICE static void write_column(const PromptEmbeddingParams& p, const TokenColumn& column, int b,
                                     const Place& place, int from, uint64_t (&bits)[kItems]) {
    const int tokens = static_cast<int>(p.sizes.tokens), rows = static_cast<int>(p.sizes.prompt_rows) + tokens;
    LK_UNROLL
    for (int i = 0; i < kItems; ++i) {
      const int r = from + i * kThreads + thread_index();
      bits[i] = r < rows ? column_bits(p, column, b, row_of(place, tokens, r)) : 0;
    }
    LK_UNROLL
    for (int i = 0; i < kItems; ++i) {
      const int r = from + i * kThreads + thread_index();
      if (r < rows) store_bits(column, static_cast<int64_t>(b) * rows + r, bits[i]);
    }
  }

  // A thread a member: one store for all.
  LK_DEVICE static void store_layout(PromptLayout* layout, const Place& place) {
    const int i = thread_index();
    if (i < 3) {
      store_global(reinterpret_cast<int64_t*>(layout) + i, int64_t{i == 0   ? place.first
                                                                   : i == 1 ? place.split
                                                                            : place.length});
    }
  }

  LK_DEVICE static uint64_t column_bits(const PromptEmbeddingParams& p, const TokenColumn& column, int b,
                                        const Row& row) {
    if (row.kind == Row::kUnused) return column.unused_value;
    if (row.kind == Row::kPrompt || column.tokens == nullptr) return column.prompt_value;
    return token_bits(p, column, b, row.index);
  }

  LK_DEVICE static uint64_t token_bits(const PromptEmbeddingParams& p, const TokenColumn& column, int b, int t) {
    const int64_t at = b * p.sizes.tokens + t;
    switch (column.element_size) {
      case 1:
        return load_global(static_cast<const uint8_t*>(column.tokens) + at);
      case 2:
        return load_global(static_cast<const uint16_t*>(column.tokens) + at);
      case 4:
        return load_global(static_cast<const uint32_t*>(column.tokens) + at);
      default:
        return load_global(static_cast<const uint64_t*>(column.tokens) + at);
    }
  }

  LK_DEVICE static void store_bits(const TokenColumn& column, int64_t at, uint64_t bits) {
    switch (column.element_size) {
      case 1:
        return store_global(static_cast<uint8_t*>(column.out) + at, static_cast<uint8_t>(bits));
      case 2:
        return store_global(static_cast<uint16_t*>(column.out) + at, static_cast<uint16_t>(bits));
      case 4:
        return store_global(static_cast<uint32_t*>(column.out) + at, static_cast<uint32_t>(bits));
      default:
        return store_global(static_cast<uint64_t*>(column.out) + at, bits);
    }
  }

  // --------------------------------------------------------------------------------------------------- rows

  // Rows [row0, row0 + rows_per_block) of sample b.
  LK_DEVICE static void write_rows(const PromptEmbeddingParams& p, int b, int row0, Scan& scan) {
    const int tokens = static_cast<int>(p.sizes.tokens), rows = static_cast<int>(p.sizes.prompt_rows) + tokens;
    const int hidden = static_cast<int>(p.sizes.hidden);
    const int end = smaller(row0 + p.rows_per_block, rows);
    const Place place = place_of(p, b, end, scan);
    LK_NO_UNROLL
    for (int r = row0 + warp_index(); r < end; r += kPromptWarps) {
      const Row row = row_of(place, tokens, r);
      Bits* const out = static_cast<Bits*>(p.out) + (static_cast<int64_t>(b) * rows + r) * hidden;
      if (row.kind == Row::kToken) {
        const int t = row.index;
        const int source_row = index_at(p.ids, b * p.sizes.tokens + t, p.sizes.vocabulary, t, p.trap_outside);
        const int bytes = hidden * static_cast<int>(sizeof(Bits));
        if (source_row == kOutside) {
          write_nan_row<Unit>(out, bytes);
        } else {
          const int64_t offset = b * p.source_batch_stride + source_row * p.source_stride;
          copy_row<Unit>(out, static_cast<const Bits*>(p.source) + offset, bytes);
        }
      } else if (row.kind == Row::kPrompt) {
        write_prompt_row(p, out, b, row.index);
      } else {
        write_row(reinterpret_cast<Unit*>(out),
                  hidden * static_cast<int>(sizeof(Bits)) / static_cast<int>(sizeof(Unit)), [](int) { return Unit{}; });
      }
    }
  }

  LK_DEVICE static void write_prompt_row(const PromptEmbeddingParams& p, Bits* out, int b, int row) {
    const int hidden = static_cast<int>(p.sizes.hidden);
    const int task = index_at(p.task_ids, b, p.sizes.tasks, 0, p.trap_outside);
    if (task == kOutside) return write_nan_row<Unit>(out, hidden * static_cast<int>(sizeof(Bits)));
    const int64_t offset = task * p.prompt_task_stride + row * p.prompt_stride;
    if (p.prompt_type == p.type) {
      copy_row<Unit>(out, static_cast<const Bits*>(p.prompt) + offset, hidden * static_cast<int>(sizeof(Bits)));
      return;
    }
    if constexpr (sizeof(Bits) == 2) {
      const float* const source = static_cast<const float*>(p.prompt) + offset;
      const auto rounded = [&](int i) {
        float f[kGroup];
        Elements<Float32>::load(source + i * kGroup, f);
        return Elements<Element>::packed(f);
      };
      write_row(reinterpret_cast<decltype(rounded(0))*>(out), hidden / kGroup, rounded);
    }
  }
};

template <class Variant>
LK_KERNEL(Variant::kThreads, Variant::kMinBlocks)
prompt_embedding_kernel(const PromptEmbeddingParams p) {
  Variant::run(p);
}

}  // namespace lk
