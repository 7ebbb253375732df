// lora_linear and its backward on the CPU. The schedules are described in cpu_gemm.h.
#include <memory>
#include <string>
#include <tuple>

#include "../cpu/kernels.h"
#include "cpu_gemm.h"

namespace lk {
namespace {

Dropout read_dropout(const Tensor& seed, double p) {
  return make_dropout(*static_cast<const int64_t*>(seed.const_data_ptr()), p);
}

// fp32 with unit column stride, as the kernels want it.
Tensor as_float_rows(const Tensor& t) {
  const Tensor f = cast(t, ScalarType::Float);
  return f.stride(1) == 1 ? f : torch::stable::contiguous(f);
}

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
float* mutable_floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// s = dropout(x) Aᵀ for rows of x; A is packed once for all of them.
class DropoutShrink {
 public:
  DropoutShrink(const Tensor& lora_A, const Dropout& dropout) : a_(as_float_rows(lora_A)), dropout_(dropout) {
    const int64_t rank = a_.size(0), k = a_.size(1);
    packed_.reset(new float[cpu::kernels().packed_a_size(rank, k)]);
    cpu::kernels().pack_a(params(nullptr, k, nullptr, 0, 0), packed_.get());
  }

  // x: rows from `first_row` of the whole matrix on. Returns fp32 [rows, rank].
  Tensor operator()(const Tensor& x, int64_t first_row) const {
    const Tensor s = new_empty_as(x, {x.size(0), a_.size(0)}, ScalarType::Float);
    for_row_blocks(x.size(0), x.scalar_type() != ScalarType::Float, [&](int64_t m0, int64_t m1) {
      const Tensor rows = as_float_rows(row_block(x, m0, m1));
      const DropoutShrinkParams p =
          params(floats(rows), rows.stride(0), mutable_floats(s) + m0 * a_.size(0), m1 - m0, first_row + m0);
      torch::stable::parallel_for(0, m1 - m0, 16, [&](int64_t begin, int64_t end) {
        cpu::kernels().dropout_shrink(p, packed_.get(), begin, end);
      });
    });
    return s;
  }

 private:
  DropoutShrinkParams params(const float* x, int64_t x_stride, float* s, int64_t rows, int64_t first_row) const {
    return {x, x_stride, floats(a_), a_.stride(0), s, rows, a_.size(1), a_.size(0), first_row, dropout_};
  }

  Tensor a_;
  Dropout dropout_;
  std::unique_ptr<float[]> packed_;
};

// Adds the branch's part to grad_x and grad_A (fp32, either may be absent) for rows from `first_row` on.
void dropout_backward(const Tensor* grad_x, const Tensor* grad_A, const Tensor& x, const Tensor& a, const Tensor& grad_s,
                      int64_t first_row, const Dropout& dropout, double scaling) {
  const Tensor rows = grad_A ? as_float_rows(x) : x;
  const int64_t k = x.size(1), rank = a.size(0);
  DropoutBackwardParams p{};
  if (grad_A) {
    p.x = floats(rows);
    p.x_stride = rows.stride(0);
    p.grad_a = mutable_floats(*grad_A);
  }
  if (grad_x) {
    p.a = floats(a);
    p.a_stride = a.stride(0);
    p.grad_x = mutable_floats(*grad_x);
    p.grad_x_stride = grad_x->stride(0);
  }
  p.grad_s = floats(grad_s);
  p.alpha = static_cast<float>(scaling) * dropout.scale;
  p.rows = x.size(0);
  p.k = k;
  p.rank = rank;
  p.first_row = first_row;
  p.dropout = dropout;
  const int64_t width = cpu::kernels().backward_tile_columns;
  torch::stable::parallel_for(0, (k + width - 1) / width, 1, [&](int64_t begin, int64_t end) {
    std::unique_ptr<float[]> scratch(new float[cpu::kernels().backward_scratch_size(rank)]);
    cpu::kernels().dropout_backward(p, scratch.get(), begin, end);
  });
}

std::tuple<Tensor, Tensor> lora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, std::optional<Tensor> bias,
                                       std::optional<Tensor> seed, double scaling, double dropout_p,
                                       std::string schedule) {
  const bool upcast = schedule == "upcast";
  const ScalarType compute = upcast ? ScalarType::Float : x.scalar_type();
  const Tensor rows = as_rows(x);
  const Tensor y = new_empty_as(x, {rows.size(0), weight.size(0)}), s = new_empty_as(x, {rows.size(0), lora_A.size(0)});
  const Tensor a_transposed = transposed(cast(lora_A, compute)), b_transposed = transposed(cast(lora_B, compute));
  std::optional<DropoutShrink> shrink;
  if (seed) shrink.emplace(lora_A, read_dropout(*seed, dropout_p));

  for_row_blocks(rows.size(0), upcast, [&](int64_t m0, int64_t m1) {
    const Tensor x_block = cast(row_block(rows, m0, m1), compute);
    Tensor s_block = row_block(s, m0, m1);
    if (shrink) {
      torch::stable::copy_(s_block, (*shrink)(x_block, m0));
    } else if (upcast) {
      const Tensor wide = new_empty_as(x_block, {m1 - m0, s.size(1)});
      mm_out(wide, x_block, a_transposed);
      torch::stable::copy_(s_block, wide);
    } else {
      mm_out(s_block, x_block, a_transposed);
    }
    const Tensor s_compute = cast(s_block, compute);
    linear(row_block(y, m0, m1), x_block, weight, bias, [&](const Tensor& block, int64_t n0, int64_t n1) {
      addmm_out(block, block, s_compute, column_block(b_transposed, n0, n1), 1.0, scaling);
    });
  });
  return {with_leading_sizes_of(y, x), with_leading_sizes_of(s, x)};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(Tensor grad_y, Tensor x, Tensor s, Tensor weight, Tensor lora_A,
                                                        Tensor lora_B, std::optional<Tensor> seed, double scaling,
                                                        double dropout_p, bool need_x, bool need_A, bool need_B,
                                                        std::string schedule) {
  // The adapters' gradients and grad_s are summed in fp32 (fp64 for fp64) and rounded to the adapter's dtype once.
  const ScalarType dtype = x.scalar_type(), wide = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  const bool native = schedule == "aten";
  const Tensor grad_rows = as_rows(grad_y), x_rows = as_rows(x), s_rows = as_rows(s);
  const Tensor a = as_rows(cast(lora_A, wide)), b = cast(lora_B, wide);
  const int64_t m = x_rows.size(0), n = weight.size(0), k = weight.size(1), rank = a.size(0);
  std::optional<Dropout> dropout;
  if (seed) dropout = read_dropout(*seed, dropout_p);

  const Tensor grad_x = new_empty_as(x, {need_x ? m : 0, k});
  Tensor grad_A = new_empty_as(x, {need_A ? rank : 0, k}, wide), grad_B = new_empty_as(x, {need_B ? n : 0, rank}, wide);
  torch::stable::zero_(grad_A);
  torch::stable::zero_(grad_B);

  for_row_blocks(m, dtype != wide, [&](int64_t m0, int64_t m1) {
    const Tensor grad = cast(row_block(grad_rows, m0, m1), wide), x_block = row_block(x_rows, m0, m1);
    const Tensor grad_s = new_empty_as(grad, {m1 - m0, rank});
    if (need_x || need_A) mm_out(grad_s, grad, b);
    if (need_B) {
      addmm_out(grad_B, grad_B, transposed(grad), cast(row_block(s_rows, m0, m1), wide), 1.0, scaling);
    }
    if (need_A && !dropout) {
      addmm_out(grad_A, grad_A, transposed(grad_s), cast(x_block, wide), 1.0, scaling);
    }
    if (!need_x) {
      if (need_A && dropout) dropout_backward(nullptr, &grad_A, x_block, a, grad_s, m0, *dropout, scaling);
      return;
    }

    Tensor target = row_block(grad_x, m0, m1);
    if (native) linear_backward(target, row_block(grad_rows, m0, m1), weight);
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
      dropout_backward(&sum, need_A ? &grad_A : nullptr, x_block, a, grad_s, m0, *dropout, scaling);
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CPU, m) {
  m.impl("lora_linear", TORCH_BOX(&lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward));
}

}  // namespace lk
