// The gradients of prompt_embedding, in one launch: blocks for the prompt's, then for the embeddings', then for the
// table's. Every sum belongs to one thread, which adds in the order of the batch: no bit depends on who comes when.
#pragma once

#include "../config/prompt_embedding.h"
#include "block_scan.cuh"
#include "prompt_rows.cuh"

namespace lk {

template <class Element_, bool kAligned_>
struct PromptEmbeddingBackward {
  using Element = Element_;
  static constexpr bool kAligned = kAligned_;
  static constexpr int kThreads = kPromptThreads, kMinBlocks = 4;
  using Scan = BlockScan<kThreads>;

 private:
  static constexpr int kListed = 2 * Scan::kFlags;

 public:
  static constexpr int kSharedBytes = Scan::kSharedBytes + 2 * kListed * 4;

  LK_DEVICE static void run(const PromptEmbeddingBackwardParams& p) {
    const int block = block_index();
    if (block < p.prompt_blocks) {
      sum_prompt(p, static_cast<int64_t>(block) * kThreads + thread_index());
    } else if (block < p.prompt_blocks + p.embeds_blocks) {
      copy_token(p, static_cast<int64_t>(block - p.prompt_blocks) * kPromptWarps + warp_index());
    } else {
      sum_vocabulary(p, (block - p.prompt_blocks - p.embeds_blocks) * kVocabularyRows);
    }
  }

 private:
  using Bits = typename Elements<Element>::Bits;
  using Unit = typename CopyUnit<Bits, kAligned>::Type;
  static constexpr int kItems = Scan::kItems, kGroup = prompt_group(kAligned);
  static constexpr int kBatch = 4;  // rows under way at a time

  LK_DEVICE static const Bits* grad_row(const PromptEmbeddingBackwardParams& p, int b, int row) {
    return static_cast<const Bits*>(p.grad) + b * p.grad_batch_stride + row * p.grad_stride;
  }

  LK_DEVICE static const Bits* grad_of_token(const PromptEmbeddingBackwardParams& p, int64_t token) {
    const int b = static_cast<int>(token / p.sizes.tokens), t = static_cast<int>(token % p.sizes.tokens);
    return grad_row(p, b, row_of_token(place_of(p, b), t));
  }

  // Within the rows of the gradient, whatever the tensor says.
  LK_DEVICE static Place place_of(const PromptEmbeddingBackwardParams& p, int b) {
    const PromptLayout layout = load_global(p.layout + b);
    const auto within = [](int64_t value, int64_t most) {
      return static_cast<int>(value < 0 ? 0 : value > most ? most : value);
    };
    const int length = within(layout.length, p.sizes.prompt_rows);
    return {within(layout.first, p.sizes.prompt_rows - length), within(layout.split, p.sizes.tokens), length};
  }

  LK_DEVICE static void add(float (&sum)[kGroup], const float (&parts)[kBatch][kGroup]) {
    LK_UNROLL
    for (int j = 0; j < kBatch; ++j) {
      LK_UNROLL
      for (int i = 0; i < kGroup; ++i) sum[i] += parts[j][i];
    }
  }

  // Group `item` of grad_prompt, counted over all tasks and rows.
  LK_DEVICE static void sum_prompt(const PromptEmbeddingBackwardParams& p, int64_t item) {
    const int64_t groups = p.sizes.hidden / kGroup, row = item / groups;
    if (row >= p.sizes.tasks * p.sizes.prompt_rows) return;
    const int task = static_cast<int>(row / p.sizes.prompt_rows), slot = static_cast<int>(row % p.sizes.prompt_rows);
    const int column = static_cast<int>(item % groups) * kGroup, batch = static_cast<int>(p.sizes.batch);
    float sum[kGroup] = {};
    LK_NO_UNROLL
    for (int first = 0; first < batch; first += kBatch) {
      float parts[kBatch][kGroup] = {};
      LK_UNROLL
      for (int j = 0; j < kBatch; ++j) {
        const int b = first + j;
        if (b >= batch || index_at(p.task_ids, b, p.sizes.tasks, 0, p.trap_outside) != task) continue;
        const Place place = place_of(p, b);
        if (slot >= place.length) continue;
        Elements<Element>::load(grad_row(p, b, place.first + place.split + slot) + column, parts[j]);
      }
      add(sum, parts);
    }
    const int64_t at = item * kGroup;
    if (p.prompt_type == FloatType::kFloat32) {
      Elements<Float32>::store(static_cast<float*>(p.grad_prompt) + at, sum);
    } else {
      Elements<Element>::store(static_cast<Bits*>(p.grad_prompt) + at, sum);
    }
  }

  // A warp copies the gradient of one token, counted over the batch.
  LK_DEVICE static void copy_token(const PromptEmbeddingBackwardParams& p, int64_t token) {
    if (token >= p.sizes.batch * p.sizes.tokens) return;
    copy_row<Unit>(static_cast<Bits*>(p.grad_embeds) + token * p.sizes.hidden, grad_of_token(p, token),
                   static_cast<int>(p.sizes.hidden * sizeof(Bits)));
  }

  // ------------------------------------------------------------------------------------------------- the table

  // Tokens in their order, each with its row of the table, in shared memory.
  struct List {
    uint32_t tokens_smem, rows_smem;
    int count;
    int64_t end;  // tokens in front of it have been looked at
  };

  // Rows [row0, row0 + kVocabularyRows) of grad_weight. Usually their tokens fit into one list.
  LK_DEVICE static void sum_vocabulary(const PromptEmbeddingBackwardParams& p, int row0) {
    const int end_row = smaller(row0 + kVocabularyRows, static_cast<int>(p.sizes.vocabulary));
    const int hidden = static_cast<int>(p.sizes.hidden);
    const int64_t tokens = p.sizes.batch * p.sizes.tokens;
    Scan scan(dynamic_shared());
    const List all = list_tokens(p, row0, end_row, 0, scan);
    LK_NO_UNROLL
    for (int row = row0; row < end_row; ++row) {
      LK_NO_UNROLL
      for (int column0 = 0; column0 < hidden; column0 += kThreads * kGroup) {
        const int column = column0 + thread_index() * kGroup;
        float sum[kGroup] = {};
        if (all.end >= tokens) {
          add_listed(p, all, row, column, sum);
        } else {
          LK_NO_UNROLL
          for (int64_t from = 0; from < tokens;) {
            const List some = list_tokens(p, row, row + 1, from, scan);
            add_listed(p, some, row, column, sum);
            from = some.end;
          }
        }
        if (column >= hidden) continue;
        Elements<Element>::store(static_cast<Bits*>(p.grad_weight) + static_cast<int64_t>(row) * hidden + column, sum);
      }
    }
  }

  // The tokens from `from` on whose id is in [row0, end_row), as many as fit.
  LK_DEVICE static List list_tokens(const PromptEmbeddingBackwardParams& p, int row0, int end_row, int64_t from,
                                    Scan& scan) {
    const int64_t tokens = p.sizes.batch * p.sizes.tokens;
    List list{dynamic_shared() + Scan::kSharedBytes, dynamic_shared() + Scan::kSharedBytes + kListed * 4, 0, from};
    LK_NO_UNROLL
    for (; list.end < tokens && list.count + Scan::kFlags <= kListed; list.end += Scan::kFlags) {
      int id[kItems];
      bool is_listed[kItems];
      LK_UNROLL
      for (int i = 0; i < kItems; ++i) {
        const int64_t t = list.end + i * kThreads + thread_index();
        id[i] = t < tokens ? index_at(p.ids, t, p.sizes.vocabulary, 0, p.trap_outside) : -1;
        is_listed[i] = id[i] >= row0 && id[i] < end_row;
      }
      int before[kItems];
      const int listed = scan.count(is_listed, before);  // behind its barrier nobody reads the list before this one
      LK_UNROLL
      for (int i = 0; i < kItems; ++i) {
        if (!is_listed[i]) continue;
        const uint32_t at = static_cast<uint32_t>(list.count + before[i]) * 4;
        store_shared_4(list.tokens_smem + at, static_cast<uint32_t>(list.end + i * kThreads + thread_index()));
        store_shared_4(list.rows_smem + at, static_cast<uint32_t>(id[i]));
      }
      list.count += listed;
    }
    sync_block();
    return list;
  }

  // sum += the gradients of the listed tokens of a row of the table.
  LK_DEVICE static void add_listed(const PromptEmbeddingBackwardParams& p, const List& list, int row, int column,
                                   float (&sum)[kGroup]) {
    LK_NO_UNROLL
    for (int first = 0; first < list.count; first += kBatch) {
      float parts[kBatch][kGroup] = {};
      LK_UNROLL
      for (int j = 0; j < kBatch; ++j) {
        const uint32_t at = static_cast<uint32_t>(first + j) * 4;
        if (first + j >= list.count || load_shared_4(list.rows_smem + at) != static_cast<uint32_t>(row)) continue;
        const int64_t token = load_shared_4(list.tokens_smem + at);
        if (column < p.sizes.hidden) Elements<Element>::load(grad_of_token(p, token) + column, parts[j]);
      }
      add(sum, parts);
    }
  }
};

template <class Variant>
LK_KERNEL(Variant::kThreads, Variant::kMinBlocks)
prompt_embedding_backward_kernel(const PromptEmbeddingBackwardParams p) {
  Variant::run(p);
}

}  // namespace lk
