// The operands of a LoRA linear as the CUDA kernels read them.
#pragma once

#include "../config/tiles.h"
#include "../launch/lora_problem.h"
#include "aten.h"
#include "rows.h"

namespace lk {

// Of x, or of what takes its place.
inline void check_type(const Tensor& x, const char* op) {
  STD_TORCH_CHECK(float_type(x) != FloatType::kFloat64, op,
                  ": the CUDA kernels serve bfloat16, float16 and, in tf32, float32");
}

// [..., n] -> [rows, n] as the kernels read it. Rows that lie further apart than they can reckon are copied.
inline Tensor matrix_of(const Tensor& t) {
  const Tensor rows = as_rows(t);
  return rows.stride(0) <= kMaxRowStride ? rows : torch::stable::contiguous(rows);
}

// The same for kernels that read rows in chunks.
inline Tensor whole_rows(const Tensor& t) {
  const Tensor rows = matrix_of(t);
  return rows_aligned(rows) ? rows : torch::stable::clone(rows);
}

inline MatrixRef ref_of(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.size(0), t.size(1), float_type(t)};
}

// An adapter as the kernels read it: fp32, or x's type. One that begins between chunks, as a view of a flat buffer may,
// is copied: it is small beside what its alignment decides.
inline Tensor adapter_rows(const Tensor& adapter, const Tensor& x) {
  const Tensor rows = matrix_of(is_fp32(adapter) ? adapter : cast(adapter, x.scalar_type()));
  const bool begins_at_chunk = reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % kChunkBytes == 0;
  return begins_at_chunk ? rows : torch::stable::clone(rows);
}

}  // namespace lk
