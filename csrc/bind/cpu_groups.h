// A LoRA branch over rows in groups on the CPU, computed in fp32: a panel is rows of one group that one thread computes
// from beginning to end. What a panel computes does not depend on the number of threads, and gradients of a group of
// several panels are summed in their order: results are the same bits on any number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "../cpu/kernels.h"
#include "../cpu/rows.h"
#include "cpu_lora.h"
#include "rows.h"

namespace lk {

constexpr int64_t kPanelRows = 256;

struct Panel {
  int64_t group, begin, end;
  int64_t part;  // 0: its group's first. Others hold gradients of their own until the sum, and are counted from 1.

  int64_t rows() const { return end - begin; }
};

struct Panels {
  std::vector<Panel> all;
  int64_t parts = 0;
  bool spread;  // over threads; else one after the other, each by all threads

  template <class F>
  void for_each(const F& f) const {
    const auto count = static_cast<int64_t>(all.size());
    if (!spread || count < 2) {
      for (const Panel& panel : all) f(panel);
      return;
    }
    std::atomic<int64_t> next{0};
    const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      for (int64_t i; (i = next++) < count;) f(all[i]);
    });
  }
};

// `end(group)` is where each group ends; they do not decrease. A group is cut into even panels where they are spread.
template <class End>
Panels cut_into_panels(int64_t groups, bool spread, const End& end) {
  Panels panels;
  panels.spread = spread;
  for (int64_t group = 0, first = 0; group < groups; ++group) {
    const int64_t last = end(group), rows = last - first;
    if (rows == 0) continue;
    const int64_t count = spread ? (rows + kPanelRows - 1) / kPanelRows : 1;
    for (int64_t i = 0; i < count; ++i) {
      panels.all.push_back(
          {group, first + rows * i / count, first + rows * (i + 1) / count, i == 0 ? 0 : ++panels.parts});
    }
    first = last;
  }
  return panels;
}

// A matrix in fp32, which may be a copy of its own.
struct FloatMatrix {
  const float* data;
  int64_t row_stride, column_stride = 1;
  std::unique_ptr<float[]> copy = nullptr;
};

// A copy with unit column stride.
inline FloatMatrix by_rows(const FloatMatrix& m, int64_t rows, int64_t columns) {
  FloatMatrix out{nullptr, columns, 1, std::unique_ptr<float[]>(new float[rows * columns])};
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < columns; ++c) out.copy[i * columns + c] = m.data[i * m.row_stride + c * m.column_stride];
  }
  out.data = out.copy.get();
  return out;
}

inline const char* address(const Tensor& t, int64_t element) {
  return static_cast<const char*>(t.const_data_ptr()) + element * static_cast<int64_t>(t.element_size());
}

// rows x columns of t from element `first` on. t is fp32 or has unit column stride.
inline FloatMatrix factor_of(const Tensor& t, int64_t first, int64_t rows, int64_t columns) {
  const int64_t down = t.stride(t.dim() - 2), along = t.stride(t.dim() - 1);
  if (is_fp32(t)) return {floats(t) + first, down, along};
  FloatMatrix out{nullptr, columns, 1, std::unique_ptr<float[]>(new float[rows * columns])};
  out.data = out.copy.get();
  const FloatType type = float_type(t);
  for (int64_t i = 0; i < rows; ++i) {
    cpu::copy_row(out.copy.get() + i * columns, FloatType::kFloat32, address(t, first + i * down), type, columns);
  }
  return out;
}

// Rows of a tensor [M, columns] as a panel sees them: row i is the tensor's row ids[i], or i where there are no ids.
class PanelRows {
 public:
  PanelRows(const Tensor& t, const int64_t* ids) : t_(t), ids_(ids), type_(float_type(t)) {}

  int64_t row(int64_t i) const { return ids_ != nullptr ? ids_[i] : i; }

  bool adjacent(const Panel& p) const {
    for (int64_t i = p.begin; ids_ != nullptr && i + 1 < p.end; ++i) {
      if (ids_[i + 1] != ids_[i] + 1) return false;
    }
    return true;
  }

  // The first `columns` of each row; where they lie, if they are fp32 and one row behind the other.
  FloatMatrix get(const Panel& p, int64_t columns) const {
    if (type_ == FloatType::kFloat32 && adjacent(p)) return {floats(t_) + row(p.begin) * t_.stride(0), t_.stride(0)};
    FloatMatrix out{nullptr, columns, 1, std::unique_ptr<float[]>(new float[p.rows() * columns])};
    float* to = out.copy.get();
    for (int64_t i = p.begin; i < p.end; ++i, to += columns) {
      cpu::copy_row(to, FloatType::kFloat32, address(t_, row(i) * t_.stride(0)), type_, columns);
    }
    out.data = out.copy.get();
    return out;
  }

  // Writes the first `columns` of each row, `stride` apart in `from`, and zeros into the others.
  void put(const Panel& p, const float* from, int64_t stride, int64_t columns) const {
    const int64_t size = t_.element_size(), all = t_.size(1);
    char* data = static_cast<char*>(t_.mutable_data_ptr());
    for (int64_t i = p.begin; i < p.end; ++i, from += stride) {
      char* to = data + row(i) * t_.stride(0) * size;
      cpu::copy_row(to, type_, from, FloatType::kFloat32, columns);
      memset(to + columns * size, 0, (all - columns) * size);
    }
  }

  bool is_fp32() const { return type_ == FloatType::kFloat32; }
  const int64_t* ids() const { return ids_; }

 private:
  const Tensor& t_;
  const int64_t* ids_;
  FloatType type_;
};

// The adapters of all groups, each with a factor of its own for its update. They lie in pools lora_A [groups, rank, k]
// and lora_B [groups, n, rank], of which a group may use fewer ranks, or are a pair of matrices each.
struct Adapters {
  std::vector<Tensor> lora_A, lora_B;  // one pool, or a matrix for each group
  double scaling;
  std::vector<int64_t> ranks = {};
  std::vector<float> scalings = {};
  std::optional<Dropout> dropout = {};

  bool pooled() const { return lora_A[0].dim() == 3; }
  int64_t groups() const { return pooled() ? lora_A[0].size(0) : static_cast<int64_t>(lora_A.size()); }
  int64_t n() const { return lora_B[0].size(lora_B[0].dim() - 2); }
  int64_t k() const { return lora_A[0].size(lora_A[0].dim() - 1); }
  int64_t rank() const { return pooled() ? lora_A[0].size(1) : *std::max_element(ranks.begin(), ranks.end()); }
  int64_t rank(int64_t group) const { return ranks.empty() ? rank() : ranks[group]; }
  float alpha(int64_t group) const { return static_cast<float>(scaling) * (scalings.empty() ? 1.0f : scalings[group]); }
  FloatMatrix a(int64_t group) const { return of(lora_A, group, rank(group), k()); }
  FloatMatrix b(int64_t group) const { return of(lora_B, group, n(), rank(group)); }

  FloatMatrix of(const std::vector<Tensor>& factors, int64_t group, int64_t rows, int64_t columns) const {
    return pooled() ? factor_of(factors[0], group * factors[0].stride(0), rows, columns)
                    : factor_of(factors[group], 0, rows, columns);
  }
};

// out [rows, rank] = rows · Wᵀ, W [rank, k] by its strides.
inline void shrink_panel(const FloatMatrix& rows, const PanelRows& source, const Panel& p, const float* w,
                         int64_t stride_j, int64_t stride_c, int64_t rank, int64_t k,
                         const std::optional<Dropout>& dropout, float* out) {
  if (k == 0) {
    memset(out, 0, sizeof(float) * p.rows() * rank);
    return;
  }
  const PackedColumns packed(w, stride_j, stride_c, rank, k);
  run_lora_shrink({.x = rows.data,
                   .x_stride = rows.row_stride,
                   .packed = packed.get(),
                   .s = out,
                   .s_stride = rank,
                   .rows = p.rows(),
                   .k = k,
                   .rank = rank,
                   .has_dropout = dropout.has_value(),
                   .first_row = p.begin,
                   .dropout = dropout.value_or(kNoDropout),
                   .row_ids = source.ids() != nullptr ? source.ids() + p.begin : nullptr});
}

// to = base + bias + alpha · s · B, B [rank, n] by its strides. base, where it is given, holds the panel's rows one
// behind the other; otherwise they are those of `to`.
inline void expand_panel(const PanelRows& to, const Tensor& target, const Panel& p, const FloatMatrix* base,
                         const float* bias, const float* s, const float* b, int64_t stride_j, int64_t stride_c,
                         int64_t rank, float alpha) {
  const int64_t n = target.size(1);
  const PackedColumns packed(b, stride_c, stride_j, n, rank);
  LoraExpandParams e{};
  e.bias = bias;
  e.s = s;
  e.packed = packed.get();
  e.alpha = alpha;
  e.n = n;
  e.rank = rank;
  FloatMatrix rows;
  if (to.is_fp32()) {
    e.y = mutable_floats(target) + (to.ids() == nullptr ? p.begin * target.stride(0) : 0);
    e.y_stride = target.stride(0);
    e.row_ids = to.ids() != nullptr ? to.ids() + p.begin : nullptr;
  } else {
    rows = to.get(p, n);
    e.y = rows.copy.get();
    e.y_stride = n;
  }
  e.base = base != nullptr ? base->data : e.y;
  e.base_stride = base != nullptr ? base->row_stride : e.y_stride;
  torch::stable::parallel_for(0, p.rows(), kNarrowRows,
                              [&](int64_t begin, int64_t end) { cpu::kernels().lora_expand(e, begin, end); });
  if (!to.is_fp32()) to.put(p, rows.data, n, n);
}

// s of a panel, [rows, its group's rank], also written to its rows of `s`; it is rounded as they are.
class PanelS {
 public:
  PanelS(const Adapters& adapters, const Tensor& x, const Tensor& s, const int64_t* ids, const Panel& p) {
    const int64_t rank = adapters.rank(p.group);
    const PanelRows from(x, ids), to(s, ids);
    const FloatMatrix rows = from.get(p, adapters.k()), a = adapters.a(p.group);
    const bool in_place = to.is_fp32() && ids == nullptr && rank == s.size(1);
    if (!in_place) own_.reset(new float[p.rows() * rank]);
    data_ = in_place ? mutable_floats(s) + p.begin * rank : own_.get();
    shrink_panel(rows, from, p, a.data, a.row_stride, a.column_stride, rank, adapters.k(), adapters.dropout, data_);
    if (in_place) return;
    to.put(p, data_, rank, rank);
    if (to.is_fp32()) return;
    const FloatMatrix rounded = to.get(p, rank);
    memcpy(data_, rounded.data, sizeof(float) * p.rows() * rank);
  }

  const float* data() const { return data_; }

 private:
  std::unique_ptr<float[]> own_;
  float* data_;
};

// Gradients of all adapters in fp32. A group's first panel writes into them, others into parts of their own; both begin
// with what `begin` clears. Groups without rows get zeros.
class Gradients {
 public:
  Gradients(const Adapters& adapters, const Panels& panels, const Tensor& x, bool need_A, bool need_B)
      : grad_A(new_empty_as(x, {need_A ? adapters.groups() : 0, adapters.rank(), adapters.k()}, ScalarType::Float)),
        grad_B(new_empty_as(x, {need_B ? adapters.groups() : 0, adapters.n(), adapters.rank()}, ScalarType::Float)),
        panels_(panels),
        size_A_(need_A ? adapters.rank() * adapters.k() : 0),
        size_B_(need_B ? adapters.rank() * adapters.n() : 0),
        all_A_(mutable_floats(grad_A)),
        all_B_(mutable_floats(grad_B)),
        parts_(new float[panels.parts * (size_A_ + size_B_)]) {
    std::vector<bool> has_rows(adapters.groups());
    for (const Panel& p : panels.all) has_rows[p.group] = true;
    for (int64_t group = 0; group < adapters.groups(); ++group) {
      if (!has_rows[group]) begin({group, 0, 0, 0});
    }
  }

  void begin(const Panel& p) {
    std::fill_n(a(p), size_A_, 0.0f);
    std::fill_n(b(p), size_B_, 0.0f);
  }

  float* a(const Panel& p) { return p.part == 0 ? all_A_ + p.group * size_A_ : parts_.get() + (p.part - 1) * size_A_; }

  float* b(const Panel& p) {
    return p.part == 0 ? all_B_ + p.group * size_B_ : parts_.get() + panels_.parts * size_A_ + (p.part - 1) * size_B_;
  }

  // Adds the parts, in order.
  void sum() {
    for (const Panel& p : panels_.all) {
      if (p.part == 0) continue;
      const Panel first{p.group, 0, 0, 0};
      add(a(first), a(p), size_A_);
      add(b(first), b(p), size_B_);
    }
  }

  Tensor grad_A, grad_B;

 private:
  static void add(float* __restrict to, const float* __restrict from, int64_t size) {
    for (int64_t i = 0; i < size; ++i) to[i] += from[i];
  }

  const Panels& panels_;
  int64_t size_A_, size_B_;
  float *all_A_, *all_B_;
  std::unique_ptr<float[]> parts_;
};

// The branch's part of a panel's gradients. `grad_x`, unless it is null, holds grad_y W in the panel's rows, or gets it
// from `base`; grad_y, x and s are [M, ...] and s is contiguous.
inline void add_panel_gradients(const Adapters& adapters, const Panel& p, const int64_t* ids, const Tensor& grad_y,
                                const Tensor& x, const Tensor& s, const Tensor* grad_x, const FloatMatrix* base,
                                Gradients& grads, bool need_A, bool need_B) {
  const int64_t rank = adapters.rank(p.group), n = adapters.n(), k = adapters.k();
  const float alpha = adapters.alpha(p.group);
  grads.begin(p);
  const PanelRows from(grad_y, ids);
  const FloatMatrix grad = from.get(p, n);
  if (need_B) {
    const FloatMatrix rows = PanelRows(s, ids).get(p, rank);
    LoraGradParams g{};
    g.x = grad.data;
    g.x_stride = grad.row_stride;
    g.s = rows.data;
    g.s_stride = rows.row_stride;
    g.grad = grads.b(p);
    g.grad_stride_j = 1;
    g.grad_stride_c = adapters.rank();
    g.alpha = alpha;
    g.rows = p.rows();
    g.k = n;
    g.rank = rank;
    run_lora_grad(g);
  }
  if (grad_x == nullptr && !need_A) return;

  const FloatMatrix a = adapters.a(p.group), b = adapters.b(p.group);
  const std::unique_ptr<float[]> grad_s(new float[p.rows() * rank]);
  shrink_panel(grad, from, p, b.data, b.column_stride, b.row_stride, rank, n, std::nullopt, grad_s.get());
  LoraGradParams g{};
  g.s = grad_s.get();
  g.s_stride = rank;
  g.alpha = alpha;
  g.rows = p.rows();
  g.k = k;
  g.rank = rank;
  FloatMatrix rows, sum;
  if (need_A) {
    rows = PanelRows(x, ids).get(p, k);
    g.x = rows.data;
    g.x_stride = rows.row_stride;
    g.grad = grads.a(p);
    g.grad_stride_j = k;
    g.grad_stride_c = 1;
  }
  if (!adapters.dropout) {
    if (grad_x != nullptr) {
      expand_panel(PanelRows(*grad_x, ids), *grad_x, p, base, nullptr, grad_s.get(), a.data, a.row_stride,
                   a.column_stride, rank, alpha);
    }
    if (need_A) run_lora_grad(g);
    return;
  }

  g.alpha *= adapters.dropout->scale;
  g.has_dropout = true;
  g.first_row = p.begin;
  g.dropout = *adapters.dropout;
  g.row_ids = ids != nullptr ? ids + p.begin : nullptr;
  FloatMatrix packed;
  if (grad_x != nullptr) {
    const PanelRows target(*grad_x, ids);
    if (base != nullptr) target.put(p, base->data, base->row_stride, k);
    sum = target.get(p, k);
    packed = a.column_stride == 1 ? FloatMatrix{a.data, a.row_stride} : by_rows(a, rank, k);
    g.a = packed.data;
    g.a_stride = packed.row_stride;
    g.grad_x = const_cast<float*>(sum.data);  // memory of grad_x, or a copy that is written back
    g.grad_x_stride = sum.row_stride;
  }
  run_lora_grad(g);
  if (sum.copy != nullptr) PanelRows(*grad_x, ids).put(p, sum.data, k, k);
}

}  // namespace lk
