// lora_linear and its backward on the CPU, by any weight of cpu_gemm.h, whose schedules they follow, and the narrow
// products of a branch.
#pragma once

#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/kernels.h"
#include "cpu_decode.h"
#include "cpu_gemm.h"

namespace lk {

inline constexpr Dropout kNoDropout{0, 0, 1.0f};

inline Dropout read_dropout(const Tensor& seed, double p) {
  return make_dropout(*static_cast<const int64_t*>(seed.const_data_ptr()), p);
}

// Of x. The kernels that drop something compute in fp32, where they write fp32, too.
inline std::optional<Dropout> dropout_of(const Tensor& x, const std::optional<Tensor>& seed, double p) {
  if (!seed) return std::nullopt;
  STD_TORCH_CHECK(x.scalar_type() != ScalarType::Double, "x must not be float64 under dropout, so seed must be None");
  return read_dropout(*seed, p);
}

// The kernels' own narrow products pay from this many rows on; below, packing the other operand costs more.
inline constexpr int64_t kOwnProductRows = 64;

// W [rank, k], element (j, c) at w[j * stride_j + c * stride_c], as the kernels that multiply by its columns read it.
class PackedColumns {
 public:
  PackedColumns(const float* w, int64_t stride_j, int64_t stride_c, int64_t rank, int64_t k)
      : packed_(new float[cpu::kernels().packed_size(rank, k)]) {
    cpu::kernels().pack_transposed(w, stride_j, stride_c, rank, k, packed_.get());
  }

  const float* get() const { return packed_.get(); }

 private:
  std::unique_ptr<float[]> packed_;
};

constexpr int64_t kNarrowRows = 16;  // rows of a narrow product that are worth a thread

inline void run_lora_shrink(const LoraShrinkParams& p) {
  torch::stable::parallel_for(0, p.rows, kNarrowRows,
                              [&](int64_t begin, int64_t end) { cpu::kernels().lora_shrink(p, begin, end); });
}

// s = factor · dropout(x) Wᵀ for blocks of rows of x, W [rank, k] packed once for all of them. Several W, each with its
// mask and the next columns of s, share one pass over x.
class Shrink {
 public:
  explicit Shrink(int64_t k) : k_(k) {}
  Shrink(const Tensor& w, const std::optional<Dropout>& dropout, double factor = 1.0) : k_(w.size(1)) {
    add(w, dropout, factor);
  }

  void add(const Tensor& w, const std::optional<Dropout>& dropout, double factor = 1.0) {
    Part part{packed(cast(w, ScalarType::Float)), rank_, w.size(0), dropout.has_value(), dropout.value_or(kNoDropout)};
    part.dropout.scale *= static_cast<float>(factor);
    rank_ += part.rank;
    parts_.push_back(std::move(part));
  }

  // x: rows from `first_row` of the whole matrix on. s: fp32 [rows, all ranks], unit column stride.
  void operator()(const Tensor& s, const Tensor& x, int64_t first_row) const {
    if (k_ == 0) {  // the kernel writes s along with the first of k's chunks
      Tensor all = s;
      torch::stable::zero_(all);
      return;
    }
    for_row_blocks(x.size(0), !is_fp32(x), [&](int64_t m0, int64_t m1) {
      const Tensor rows = as_float_rows(row_block(x, m0, m1));
      const auto multiply = [&](const Part& part, int64_t begin, int64_t end) {
        const LoraShrinkParams p{.x = floats(rows),
                                 .x_stride = rows.stride(0),
                                 .packed = part.packed.get(),
                                 .s = mutable_floats(s) + m0 * s.stride(0) + part.column,
                                 .s_stride = s.stride(0),
                                 .rows = m1 - m0,
                                 .k = k_,
                                 .rank = part.rank,
                                 .has_dropout = part.has_dropout,
                                 .first_row = first_row + m0,
                                 .dropout = part.dropout};
        cpu::kernels().lora_shrink(p, begin, end);
      };
      torch::stable::parallel_for(0, m1 - m0, kNarrowRows, [&](int64_t begin, int64_t end) {
        const int64_t step = parts_.size() == 1 ? end - begin : kSharedRows;
        for (int64_t m = begin; m < end; m += step) {
          for (const Part& part : parts_) multiply(part, m, std::min(end, m + step));
        }
      });
    });
  }

 private:
  static constexpr int64_t kSharedRows = 24;  // whole tiles of rows, which stay in a cache from one W to the next

  struct Part {
    PackedColumns packed;
    int64_t column, rank;
    bool has_dropout;
    Dropout dropout;
  };

  static PackedColumns packed(const Tensor& w) { return {floats(w), w.stride(0), w.stride(1), w.size(0), w.size(1)}; }

  int64_t k_, rank_ = 0;
  std::vector<Part> parts_;
};

inline void run_lora_grad(const LoraGradParams& p) {
  const int64_t width = cpu::kernels().lora_grad_tile(p.has_dropout);
  torch::stable::parallel_for(0, (p.k + width - 1) / width, 1, [&](int64_t begin, int64_t end) {
    std::unique_ptr<float[]> scratch(new float[cpu::kernels().lora_grad_scratch_size(p.rank, end - begin)]);
    cpu::kernels().lora_grad(p, scratch.get(), begin, end);
  });
}

// grad[rank, k] += alpha · sᵀ x, for blocks of rows; grad may be a transposed view. s has unit column stride.
inline void add_grad(const Tensor& grad, const Tensor& s, const Tensor& x, double alpha) {
  if (!is_fp32(grad) || x.size(0) < kOwnProductRows || x.stride(1) != 1) {
    addmm_out(grad, grad, transposed(s), x, 1.0, alpha);
    return;
  }
  LoraGradParams p{};
  p.x = floats(x);
  p.x_stride = x.stride(0);
  p.s = floats(s);
  p.s_stride = s.stride(0);
  p.grad = mutable_floats(grad);
  p.grad_stride_j = grad.stride(0);
  p.grad_stride_c = grad.stride(1);
  p.alpha = static_cast<float>(alpha);
  p.rows = x.size(0);
  p.k = x.size(1);
  p.rank = s.size(1);
  run_lora_grad(p);
}

// Adds the branch's part to grad_x and grad_A (fp32, either may be absent) for rows from `first_row` on.
inline void add_dropout_grads(const Tensor* grad_x, const Tensor* grad_A, const Tensor& x, const Tensor& a,
                              const Tensor& grad_s, int64_t first_row, const Dropout& dropout, double scaling) {
  const Tensor rows = grad_A ? as_float_rows(x) : x;
  LoraGradParams p{};
  if (grad_A) {
    p.x = floats(rows);
    p.x_stride = rows.stride(0);
    p.grad = mutable_floats(*grad_A);
    p.grad_stride_j = grad_A->stride(0);
    p.grad_stride_c = grad_A->stride(1);
  }
  if (grad_x) {
    p.a = floats(a);
    p.a_stride = a.stride(0);
    p.grad_x = mutable_floats(*grad_x);
    p.grad_x_stride = grad_x->stride(0);
  }
  p.s = floats(grad_s);
  p.s_stride = grad_s.stride(0);
  p.alpha = static_cast<float>(scaling) * dropout.scale;
  p.rows = x.size(0);
  p.k = x.size(1);
  p.rank = a.size(0);
  p.has_dropout = true;
  p.first_row = first_row;
  p.dropout = dropout;
  run_lora_grad(p);
}

// x: rows from `first_row` of the matrix that the mask belongs to.
template <class Weight>
std::tuple<Tensor, Tensor> lora_forward(const Tensor& x, const Weight& weight, const Tensor& lora_A,
                                        const Tensor& lora_B, const std::optional<Tensor>& bias,
                                        const std::optional<Tensor>& seed, double scaling, double dropout_p,
                                        const std::string& schedule, int64_t first_row = 0) {
  const Tensor rows = as_rows(x);
  const Tensor s = new_empty_as(x, {rows.size(0), lora_A.size(0)});
  const bool upcast = schedule == "upcast", onednn = schedule == "onednn";
  const ScalarType compute = upcast ? ScalarType::Float : x.scalar_type();
  const Tensor y = onednn ? onednn_linear(rows, weight, bias) : new_empty_as(x, {rows.size(0), weight.n()});
  const Tensor a_transposed = transposed(cast(lora_A, compute)), b_transposed = transposed(cast(lora_B, compute));
  const std::optional<Dropout> dropout = dropout_of(x, seed, dropout_p);
  std::optional<Shrink> shrink;
  if (dropout || (compute == ScalarType::Float && rows.size(0) >= kOwnProductRows)) shrink.emplace(lora_A, dropout);

  for_row_blocks(rows.size(0), upcast, [&](int64_t m0, int64_t m1) {
    const Tensor x_block = cast(row_block(rows, m0, m1), compute);
    Tensor s_block = row_block(s, m0, m1), s_wide = s_block;
    if (!is_fp32(s) && (shrink || upcast)) s_wide = new_empty_as(s, {m1 - m0, s.size(1)}, ScalarType::Float);
    if (shrink) {
      (*shrink)(s_wide, x_block, first_row + m0);
    } else {
      mm_out(s_wide, x_block, a_transposed);
    }
    if (s_wide.get() != s_block.get()) torch::stable::copy_(s_block, s_wide);
    const Tensor s_compute = cast(s_block, compute);
    const auto add_branch = [&](const Tensor& block, int64_t n0, int64_t n1) {
      addmm_out(block, block, s_compute, column_block(b_transposed, n0, n1), 1.0, scaling);
    };
    if (onednn) {
      add_branch(y, 0, y.size(1));
    } else {
      linear(row_block(y, m0, m1), x_block, weight, bias, add_branch);
    }
  });
  return {with_leading_sizes_of(y, x), with_leading_sizes_of(s, x)};
}

// All operands 16-bit, of one dtype that the CPU multiplies itself: converting them would take longer than the
// products. grad_s is rounded, as s is, after the scaling: fp16 may not hold it before.
template <class Weight>
std::tuple<Tensor, Tensor, Tensor> backward_16bit(const Tensor& grad_y, const Tensor& x, const Tensor& s,
                                                  const Weight& weight, const Tensor& lora_A, const Tensor& lora_B,
                                                  double scaling, bool need_x, bool need_A, bool need_B) {
  const int64_t m = x.size(0), n = weight.n(), k = weight.k(), rank = lora_A.size(0);
  const Tensor grad_x = need_x ? new_empty_as(x, {m, k}) : new_empty_as(x, {0});
  const Tensor grad_A = need_A ? new_empty_as(x, {rank, k}) : new_empty_as(x, {0});
  const Tensor grad_B = need_B ? new_empty_as(x, {n, rank}) : new_empty_as(x, {0});
  const Tensor grad_s = new_empty_as(x, {m, rank});
  if (need_x || need_A) addmm_out(grad_s, grad_s, grad_y, lora_B, 0.0, scaling);
  if (need_x) {
    linear_backward(grad_x, grad_y, weight);
    addmm_out(grad_x, grad_x, grad_s, lora_A, 1.0, 1.0);
  }
  if (need_A) mm_out(grad_A, transposed(grad_s), x);
  if (need_B) addmm_out(grad_B, grad_B, transposed(grad_y), s, 0.0, scaling);
  return {grad_x, grad_A, grad_B};
}

template <class Weight>
std::tuple<Tensor, Tensor, Tensor> lora_backward(const Tensor& grad_y, const Tensor& x, const Tensor& s,
                                                 const Weight& weight, const Tensor& lora_A, const Tensor& lora_B,
                                                 const std::optional<Tensor>& seed, double scaling, double dropout_p,
                                                 bool need_x, bool need_A, bool need_B, const std::string& schedule,
                                                 int64_t first_row = 0) {
  // The adapters' gradients are summed in fp32 (fp64 for fp64) and rounded to the adapter's dtype once.
  const ScalarType dtype = x.scalar_type(), wide = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  const bool onednn = schedule == "onednn", native = schedule != "upcast";
  const Tensor grad_rows = as_rows(grad_y), x_rows = as_rows(x);
  const Tensor s_rows = as_rows(torch::stable::contiguous(s));
  if (schedule == "native" && !seed && lora_A.scalar_type() == dtype) {
    auto [grad_x, grad_A, grad_B] =
        backward_16bit(grad_rows, x_rows, s_rows, weight, lora_A, lora_B, scaling, need_x, need_A, need_B);
    return {need_x ? with_leading_sizes_of(grad_x, x) : grad_x, grad_A, grad_B};
  }
  const Tensor a = as_rows(cast(lora_A, wide)), b = cast(lora_B, wide);
  const int64_t m = x_rows.size(0), n = weight.n(), k = weight.k(), rank = a.size(0);
  const std::optional<Dropout> dropout = dropout_of(x, seed, dropout_p);

  const Tensor grad_x =
      onednn && need_x ? onednn_linear_backward(grad_rows, weight) : new_empty_as(x, {need_x ? m : 0, k});
  Tensor grad_A = new_empty_as(x, {need_A ? rank : 0, k}, wide), grad_B = new_empty_as(x, {need_B ? n : 0, rank}, wide);
  torch::stable::zero_(grad_A);
  torch::stable::zero_(grad_B);
  std::optional<Shrink> shrink;  // grad_s = grad_y · B
  if ((need_x || need_A) && wide == ScalarType::Float && m >= kOwnProductRows)
    shrink.emplace(transposed(b), std::nullopt);

  for_row_blocks(m, dtype != wide, [&](int64_t m0, int64_t m1) {
    const Tensor grad = cast(row_block(grad_rows, m0, m1), wide), x_block = row_block(x_rows, m0, m1);
    const Tensor grad_s = new_empty_as(grad, {m1 - m0, rank});
    if (shrink) {
      (*shrink)(grad_s, grad, m0);
    } else if (need_x || need_A) {
      mm_out(grad_s, grad, b);
    }
    if (need_B) add_grad(transposed(grad_B), cast(row_block(s_rows, m0, m1), wide), grad, scaling);
    if (need_A && !dropout) add_grad(grad_A, grad_s, cast(x_block, wide), scaling);
    if (!need_x) {
      if (need_A && dropout) add_dropout_grads(nullptr, &grad_A, x_block, a, grad_s, first_row + m0, *dropout, scaling);
      return;
    }

    Tensor target = row_block(grad_x, m0, m1);
    if (native && !onednn) linear_backward(target, row_block(grad_rows, m0, m1), weight);
    if (native && !dropout) {
      addmm_out(target, target, cast(grad_s, dtype), cast(a, dtype), 1.0, scaling);
      return;
    }
    Tensor sum = target;
    if (!native) {
      sum = new_empty_as(grad, {m1 - m0, k});
      linear_backward(sum, grad, weight);
    } else if (dtype != wide) {
      sum = cast(target, wide);
    }
    if (dropout) {
      add_dropout_grads(&sum, need_A ? &grad_A : nullptr, x_block, a, grad_s, first_row + m0, *dropout, scaling);
    } else {
      addmm_out(sum, sum, grad_s, a, 1.0, scaling);
    }
    if (dtype != wide) torch::stable::copy_(target, sum);
  });

  const Tensor nothing = new_empty_as(x, {0});
  return {need_x ? with_leading_sizes_of(grad_x, x) : nothing,
          need_A ? cast(grad_A, lora_A.scalar_type()) : new_empty_as(lora_A, {0}),
          need_B ? cast(grad_B, lora_B.scalar_type()) : new_empty_as(lora_B, {0})};
}

}  // namespace lk
