// grouped_lora_linear and its backward on the CPU. A shared weight's product is one over all rows, by the schedules of
// cpu_gemm.h, and the branch is computed in panels (cpu_groups.h). Weights of the groups' own are multiplied in panels,
// too, each with the vendor's product of its rows, "spread" over threads where the schedule says so; 16 bits that are
// not, group by group as lora_linear multiplies them.
#include <string>
#include <tuple>

#include "cpu_groups.h"
#include "grouped_checks.h"

namespace lk {
namespace {

// Up to so many rows a weight is read once, by the kernel for few rows.
constexpr int64_t kFewRows = 4;

// oneDNN makes code for every number of rows that it meets, which takes as long as a product: it is given multiples of
// this, and what it computes of others' rows is left out.
constexpr int64_t kRowMultiple = 8;

const std::string kSpread = "spread ";

bool is_spread(const std::string& schedule) { return schedule.compare(0, kSpread.size(), kSpread) == 0; }

// The schedule of a product.
std::string product_of(const std::string& schedule) {
  return is_spread(schedule) ? schedule.substr(kSpread.size()) : schedule;
}

std::vector<int64_t> ends_of(const Tensor& offsets, int64_t rows) {
  std::vector<int64_t> ends(offsets.size(0));
  const auto* data = static_cast<const int32_t*>(offsets.const_data_ptr());
  int64_t last = 0;
  for (size_t g = 0; g < ends.size(); ++g) {
    ends[g] = data[static_cast<int64_t>(g) * offsets.stride(0)];
    STD_TORCH_CHECK(ends[g] >= last && ends[g] <= rows,
                    "offsets must be ends that do not decrease, nor exceed x's rows");
    last = ends[g];
  }
  return ends;
}

Panels panels_of(const std::vector<int64_t>& ends, bool spread) {
  return cut_into_panels(static_cast<int64_t>(ends.size()), spread, [&](int64_t group) { return ends[group]; });
}

// A group's [rows, columns] of a tensor of all.
Tensor of_group(const Tensor& t, int64_t group) {
  return view2d(t, {t.size(1), t.size(2)}, {t.stride(1), t.stride(2)}, group * t.stride(0));
}

std::optional<Tensor> bias_of(const std::optional<Tensor>& bias, int64_t group) {
  return !bias || bias->dim() == 1 ? bias : std::optional(torch::stable::select(*bias, 0, group));
}

// Rows from `end` on are nobody's.
void clear_rows_from(const Tensor& t, int64_t end) {
  if (end == t.size(0)) return;
  Tensor rest = row_block(t, end, t.size(0));
  torch::stable::zero_(rest);
}

// The panel's rows of x, times wᵀ, into the same rows of y, or into a tensor of its own where oneDNN does it: then
// base() says where.
struct PanelProduct {
  std::optional<Tensor> own;
  FloatMatrix rows;

  PanelProduct(const Tensor& y, const Tensor& x, const Tensor& w, const Panel& p, bool onednn) {
    if (!onednn) {
      mm_out(row_block(y, p.begin, p.end), row_block(x, p.begin, p.end), transposed(w));
      return;
    }
    const int64_t count = std::min(x.size(0), (p.rows() + kRowMultiple - 1) / kRowMultiple * kRowMultiple);
    const int64_t begin = std::min(p.begin, x.size(0) - count);
    own = onednn_linear(row_block(x, begin, begin + count), w, std::nullopt);
    rows = {floats(*own) + (p.begin - begin) * own->stride(0), own->stride(0)};
  }

  const FloatMatrix* base() const { return own ? &rows : nullptr; }
};

// A panel of few rows, whose weight, factors and bias have unit column strides.
void decode_panel(const Tensor& y, const Tensor& s, const Tensor& x, const Tensor& w, const FloatMatrix& a,
                  const FloatMatrix& b, const float* bias, float alpha, const Panel& p) {
  LoraDecodeParams d{};
  d.x = floats(x) + p.begin * x.stride(0);
  d.x_stride = x.stride(0);
  d.w = a.data;
  d.w_stride = a.row_stride;
  d.y = mutable_floats(s) + p.begin * s.size(1);
  d.rows = p.rows();
  d.n = s.size(1);
  d.k = x.size(1);
  run_decode(d);
  d.w = floats(w);
  d.w_stride = w.stride(0);
  d.bias = bias;
  d.s = d.y;
  d.rank = s.size(1);
  d.b = b.data;
  d.b_stride = b.row_stride;
  d.alpha = alpha;
  d.y = mutable_floats(y) + p.begin * y.size(1);
  d.n = y.size(1);
  run_decode(d);
}

// The factors of the groups that have rows, with unit column stride; copies are fp32. PEFT keeps lora_B with the groups
// fastest: a row of all groups is read at a time.
Tensor by_rows(const Tensor& pool, const Panels& panels) {
  const int64_t rows = pool.size(1), columns = pool.size(2);
  if (pool.stride(2) == 1) return pool;
  const int64_t of_group = pool.stride(0), of_row = pool.stride(1), of_column = pool.stride(2);
  const Tensor out = new_empty_as(pool, {pool.size(0), rows, columns}, ScalarType::Float);
  const void* const data = pool.const_data_ptr();
  float* const to = mutable_floats(out);
  cpu::with_float_type(float_type(pool), [&](auto zero) {
    const auto* from = static_cast<const decltype(zero)*>(data);
    torch::stable::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (const Panel& p : panels.all) {
          if (p.part != 0) continue;
          const auto* from_row = from + p.group * of_group + i * of_row;
          float* to_row = to + (p.group * rows + i) * columns;
          for (int64_t c = 0; c < columns; ++c) to_row[c] = cpu::to_float(from_row[c * of_column]);
        }
      }
    });
  });
  return out;
}

// The groups' biases in fp32, and where one of them is.
class Biases {
 public:
  explicit Biases(const std::optional<Tensor>& bias) {
    if (bias) rows_ = cast(torch::stable::contiguous(*bias), ScalarType::Float);
  }

  const float* of(int64_t group) const {
    return !rows_ ? nullptr : floats(*rows_) + (rows_->dim() == 2 ? group * rows_->size(1) : 0);
  }

 private:
  std::optional<Tensor> rows_;
};

void put(const Tensor& t, const Panel& p, const Tensor& rows) {
  Tensor target = row_block(t, p.begin, p.end);
  torch::stable::copy_(target, rows);
}

// Of panels that are whole groups, as lora_linear computes them.
void forward_each(const Tensor& y, const Tensor& s, const Tensor& x, const Tensor& weight, const Adapters& adapters,
                  const std::optional<Tensor>& bias, const std::optional<Tensor>& seed, double dropout_p,
                  const Panels& panels, const std::string& schedule) {
  for (const Panel& p : panels.all) {
    const Tensor w = of_group(weight, p.group);
    const auto [y_rows, s_rows] =
        lora_forward(row_block(x, p.begin, p.end), PlainMatrix(w), of_group(adapters.lora_A[0], p.group),
                     of_group(adapters.lora_B[0], p.group), bias_of(bias, p.group), seed, adapters.scaling, dropout_p,
                     schedule, p.begin);
    put(y, p, y_rows);
    put(s, p, s_rows);
  }
}

// Without a weight, y holds the product with one that all groups share.
void forward_panels(const Tensor& y, const Tensor& s, const Tensor& x, const Tensor* weight, const Adapters& adapters,
                    const std::optional<Tensor>& bias, const Panels& panels, bool onednn) {
  const Biases biases(bias);
  panels.for_each([&](const Panel& p) {
    const FloatMatrix b = adapters.b(p.group);
    std::optional<PanelProduct> product;
    if (weight != nullptr) {
      const Tensor w = of_group(*weight, p.group);
      if (p.rows() <= kFewRows && is_fp32(x) && w.stride(1) == 1 && !adapters.dropout) {
        decode_panel(y, s, x, w, adapters.a(p.group), b, biases.of(p.group), adapters.alpha(p.group), p);
        return;
      }
      product.emplace(y, x, w, p, onednn);
    }
    const PanelS panel_s(adapters, x, s, nullptr, p);
    expand_panel(PanelRows(y, nullptr), y, p, product ? product->base() : nullptr, biases.of(p.group), panel_s.data(),
                 b.data, b.column_stride, b.row_stride, adapters.rank(), adapters.alpha(p.group));
  });
}

std::tuple<Tensor, Tensor> grouped_lora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor offsets,
                                               std::optional<Tensor> bias, std::optional<Tensor> seed, double scaling,
                                               double dropout_p, std::string schedule) {
  check_grouped_lora_linear(x, weight, lora_A, lora_B, offsets, bias, seed);
  const Tensor rows = as_rows(x), s = new_empty_as(x, {rows.size(0), lora_A.size(1)});
  const std::vector<int64_t> ends = ends_of(offsets, rows.size(0));
  const Panels panels = panels_of(ends, is_spread(schedule));
  const std::string product = product_of(schedule);
  Adapters adapters{{by_rows(lora_A, panels)}, {by_rows(lora_B, panels)}, scaling};
  if (seed) adapters.dropout = read_dropout(*seed, dropout_p);

  std::optional<Tensor> y;
  if (weight.dim() == 2) {
    const bool one = bias && bias->dim() == 1;
    y = base_forward(rows, PlainMatrix(weight), one ? bias : std::nullopt, product);
    forward_panels(*y, s, rows, nullptr, adapters, one ? std::nullopt : bias, panels, false);
  } else {
    y = new_empty_as(x, {rows.size(0), lora_B.size(1)});
    if (is_fp32(x) || is_spread(schedule)) {
      forward_panels(*y, s, rows, &weight, adapters, bias, panels, product == "onednn");
    } else {
      forward_each(*y, s, rows, weight, adapters, bias, seed, dropout_p, panels, product);
    }
  }
  clear_rows_from(*y, ends.back());
  clear_rows_from(s, ends.back());
  return {*y, s};
}

using Gradient = std::tuple<Tensor, Tensor, Tensor>;

Gradient backward_each(const Tensor& grad_y, const Tensor& x, const Tensor& s, const Tensor& weight,
                       const Adapters& adapters, const std::optional<Tensor>& seed, double dropout_p, bool need_x,
                       bool need_A, bool need_B, const Panels& panels, const std::string& schedule) {
  const int64_t m = x.size(0), groups = adapters.groups(), rank = adapters.rank(), n = adapters.n(), k = adapters.k();
  const Tensor grad_x = new_empty_as(x, {need_x ? m : 0, k});
  Tensor grad_A = new_empty_as(adapters.lora_A[0], {need_A ? groups : 0, rank, k});
  Tensor grad_B = new_empty_as(adapters.lora_B[0], {need_B ? groups : 0, n, rank});
  torch::stable::zero_(grad_A);
  torch::stable::zero_(grad_B);
  for (const Panel& p : panels.all) {
    const Tensor w = of_group(weight, p.group);
    const auto [of_x, of_A, of_B] =
        lora_backward(row_block(grad_y, p.begin, p.end), row_block(x, p.begin, p.end), row_block(s, p.begin, p.end),
                      PlainMatrix(w), of_group(adapters.lora_A[0], p.group), of_group(adapters.lora_B[0], p.group),
                      seed, adapters.scaling, dropout_p, need_x, need_A, need_B, schedule, p.begin);
    if (need_x) put(grad_x, p, of_x);
    Tensor a = of_group(grad_A, p.group), b = of_group(grad_B, p.group);
    if (need_A) torch::stable::copy_(a, of_A);
    if (need_B) torch::stable::copy_(b, of_B);
  }
  return {grad_x, grad_A, grad_B};
}

Gradient backward_panels(const Tensor& grad_y, const Tensor& x, const Tensor& s, const Tensor& weight,
                         const Adapters& adapters, bool need_x, bool need_A, bool need_B, const Panels& panels,
                         const std::string& product) {
  const bool shared = weight.dim() == 2;
  const Tensor grad_x = need_x && shared ? base_backward(grad_y, PlainMatrix(weight), product)
                                         : new_empty_as(x, {need_x ? x.size(0) : 0, x.size(1)});
  Gradients grads(adapters, panels, x, need_A, need_B);
  panels.for_each([&](const Panel& p) {
    std::optional<PanelProduct> base;
    if (need_x && !shared) {
      base.emplace(grad_x, grad_y, transposed(of_group(weight, p.group)), p, product == "onednn");
    }
    add_panel_gradients(adapters, p, nullptr, grad_y, x, s, need_x ? &grad_x : nullptr, base ? base->base() : nullptr,
                        grads, need_A, need_B);
  });
  grads.sum();
  return {grad_x, grads.grad_A, grads.grad_B};
}

Gradient grouped_lora_linear_backward(Tensor grad_y, Tensor x, Tensor s, Tensor weight, Tensor lora_A, Tensor lora_B,
                                      Tensor offsets, std::optional<Tensor> seed, double scaling, double dropout_p,
                                      bool need_x, bool need_A, bool need_B, std::string schedule) {
  check_grouped_lora_linear_backward(grad_y, x, s, weight, lora_A, lora_B, offsets, seed);
  const Tensor grad_rows = as_rows(grad_y), x_rows = as_rows(x), s_rows = as_rows(torch::stable::contiguous(s));
  const std::vector<int64_t> ends = ends_of(offsets, x_rows.size(0));
  const Panels panels = panels_of(ends, is_spread(schedule));
  const std::string product = product_of(schedule);
  Adapters adapters{{by_rows(lora_A, panels)}, {by_rows(lora_B, panels)}, scaling};
  if (seed) adapters.dropout = read_dropout(*seed, dropout_p);
  const auto [grad_x, grad_A, grad_B] =
      weight.dim() == 2 || is_fp32(x) || is_spread(schedule)
          ? backward_panels(grad_rows, x_rows, s_rows, weight, adapters, need_x, need_A, need_B, panels, product)
          : backward_each(grad_rows, x_rows, s_rows, weight, adapters, seed, dropout_p, need_x, need_A, need_B, panels,
                          product);
  if (need_x) clear_rows_from(grad_x, ends.back());
  return {need_x ? grad_x : new_empty_as(x, {0}),
          need_A ? cast(grad_A, lora_A.scalar_type()) : new_empty_as(lora_A, {0}),
          need_B ? cast(grad_B, lora_B.scalar_type()) : new_empty_as(lora_B, {0})};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CPU, m) {
  m.impl("grouped_lora_linear", TORCH_BOX(&grouped_lora_linear));
  m.impl("grouped_lora_linear_backward", TORCH_BOX(&grouped_lora_linear_backward));
}

}  // namespace lk
