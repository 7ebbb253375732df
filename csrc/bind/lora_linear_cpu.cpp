// lora_linear and its backward on the CPU, by a plain and by a packed weight. The schedules are described in
// cpu_gemm.h.
#include <memory>
#include <string>
#include <tuple>

#include "cpu_lora.h"
#include "lora_checks.h"
#include "packed_rows.h"
#include "packed_weight.h"

namespace lk {
namespace {

void check_no_dropout(const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(!seed, "the decode and rows schedules serve no dropout, so seed must be None");
}

// y of a few fp32 rows, and into `s` [rows, rank] what its name says, without the vendor library: W is read once, and
// every call into ATen would cost as much as a small layer takes.
Tensor decode_rows(const Tensor& rows, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                   const std::optional<Tensor>& bias, double scaling, float* s) {
  STD_TORCH_CHECK(is_fp32(rows) && weight.stride(1) == 1, "the decode schedule serves fp32 with unit column stride");
  const Tensor a = as_float_rows(lora_A), b = as_float_rows(lora_B);
  const Tensor y = new_empty_as(rows, {rows.size(0), weight.size(0)});
  const std::optional<Tensor> bias_row = contiguous(bias);
  run_decode(decode_params(rows, a, s));

  LoraDecodeParams p = decode_params(rows, weight, mutable_floats(y));
  p.s = s;
  p.rank = a.size(0);
  p.b = floats(b);
  p.b_stride = b.stride(0);
  p.alpha = static_cast<float>(scaling);
  p.bias = bias_row ? floats(*bias_row) : nullptr;
  run_decode(p);
  return y;
}

// The decode schedule where s is not asked for. Its call is a good part of a small layer's time, so it takes and
// returns no more than it needs.
Tensor lora_decode(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, std::optional<Tensor> bias, double scaling) {
  check_lora_linear(x, weight, lora_A, lora_B, bias, std::nullopt);
  const Tensor rows = as_rows(x);
  std::unique_ptr<float[]> s(new float[rows.size(0) * lora_A.size(0)]);
  return with_leading_sizes_of(decode_rows(rows, weight, lora_A, lora_B, bias, scaling, s.get()), x);
}

std::tuple<Tensor, Tensor> lora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B,
                                       std::optional<Tensor> bias, std::optional<Tensor> seed, double scaling,
                                       double dropout_p, std::string schedule) {
  check_lora_linear(x, weight, lora_A, lora_B, bias, seed);
  if (schedule == "decode") {
    check_no_dropout(seed);
    const Tensor rows = as_rows(x), s = new_empty_as(x, {rows.size(0), lora_A.size(0)});
    const Tensor y = decode_rows(rows, weight, lora_A, lora_B, bias, scaling, mutable_floats(s));
    return {with_leading_sizes_of(y, x), with_leading_sizes_of(s, x)};
  }
  return lora_forward(x, PlainMatrix(weight), lora_A, lora_B, bias, seed, scaling, dropout_p, schedule);
}

// A few rows, without the vendor library for the base product. s is rounded to x's dtype before it is multiplied.
std::tuple<Tensor, Tensor> packed_rows(const Tensor& x, const PackedWeight& weight, const Tensor& lora_A,
                                       const Tensor& lora_B, const std::optional<Tensor>& bias, double scaling,
                                       bool in_registers) {
  const Tensor x_rows = as_rows(x), rows = as_float_rows(x_rows), a = as_float_rows(lora_A), b = as_float_rows(lora_B);
  const Tensor wide = new_empty_as(rows, {rows.size(0), a.size(0)});
  if (in_registers) {
    run_decode(decode_params(rows, a, mutable_floats(wide)));
  } else {
    mm_out(wide, rows, transposed(a));
  }
  const Tensor s = cast(wide, x.scalar_type());
  const PackedBranch branch{cast(s, ScalarType::Float), b, scaling};
  const Tensor y =
      cast(multiply_packed(in_registers ? rows : x_rows, weight, bias, &branch, in_registers), x.scalar_type());
  return {with_leading_sizes_of(y, x), with_leading_sizes_of(s, x)};
}

std::tuple<Tensor, Tensor> lora_linear_packed(Tensor x, std::vector<Tensor> weight, std::string layout, int64_t n,
                                              int64_t k, int64_t block, ScalarType dtype, Tensor lora_A, Tensor lora_B,
                                              std::optional<Tensor> bias, std::optional<Tensor> seed, double scaling,
                                              double dropout_p, std::string schedule) {
  check_packed_rows(x, k);
  check_bias(x, n, bias);
  check_adapter(x, n, k, lora_A, lora_B, seed);
  const PackedWeight w = packed_weight_for({weight, layout, n, k, block, dtype}, x.scalar_type());
  if (schedule == "decode" || schedule == "rows") {
    check_no_dropout(seed);
    return packed_rows(x, w, lora_A, lora_B, bias, scaling, schedule == "decode");
  }
  return lora_forward(x, PackedMatrix(w), lora_A, lora_B, bias, seed, scaling, dropout_p, schedule);
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(Tensor grad_y, Tensor x, Tensor s, Tensor weight, Tensor lora_A,
                                                        Tensor lora_B, std::optional<Tensor> seed, double scaling,
                                                        double dropout_p, bool need_x, bool need_A, bool need_B,
                                                        std::string schedule) {
  check_lora_linear_backward(grad_y, x, s, weight, lora_A, lora_B, seed);
  return lora_backward(grad_y, x, s, PlainMatrix(weight), lora_A, lora_B, seed, scaling, dropout_p, need_x, need_A,
                       need_B, schedule);
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_packed_backward(Tensor grad_y, Tensor x, Tensor s,
                                                               std::vector<Tensor> weight, std::string layout,
                                                               int64_t n, int64_t k, int64_t block, ScalarType dtype,
                                                               Tensor lora_A, Tensor lora_B, std::optional<Tensor> seed,
                                                               double scaling, double dropout_p, bool need_x,
                                                               bool need_A, bool need_B, std::string schedule) {
  check_packed_rows(x, k);
  check_adapter(x, n, k, lora_A, lora_B, seed);
  check_gradient(grad_y, x, s, n, lora_A.size(0));
  const PackedMatrix w(packed_weight_for({weight, layout, n, k, block, dtype}, x.scalar_type()));
  return lora_backward(grad_y, x, s, w, lora_A, lora_B, seed, scaling, dropout_p, need_x, need_A, need_B, schedule);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CPU, m) {
  m.impl("lora_linear", TORCH_BOX(&lora_linear));
  m.impl("lora_decode", TORCH_BOX(&lora_decode));
  m.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward));
  m.impl("lora_linear_packed", TORCH_BOX(&lora_linear_packed));
  m.impl("lora_linear_packed_backward", TORCH_BOX(&lora_linear_packed_backward));
}

}  // namespace lk
