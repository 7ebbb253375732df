// multi_lora_linear, the halves of its branch, and its backward on the CPU. The base is one product over all rows, by
// the schedules of cpu_gemm.h; the branch is computed in panels of rows that share an adapter (cpu_groups.h), wherever
// in x they are. A row's numbers depend on nothing but the row, its adapter and how many rows there are.
#include <string>
#include <tuple>

#include "cpu_groups.h"
#include "multi_checks.h"

namespace lk {
namespace {

template <class F>
void for_each_integer(const Tensor& t, const F& f) {
  const int64_t count = t.size(0), stride = t.stride(0);
  const void* data = t.const_data_ptr();
  for (int64_t i = 0; i < count; ++i) {
    f(i, t.scalar_type() == ScalarType::Int ? static_cast<const int32_t*>(data)[i * stride]
                                            : static_cast<const int64_t*>(data)[i * stride]);
  }
}

// The rows of each adapter, in the order of rows, and the rows of none.
class Slots {
 public:
  Slots(const char* op, const Tensor& ids, int64_t adapters) : ends_(adapters) {
    std::vector<int64_t> slots(ids.size(0));
    for_each_integer(ids, [&](int64_t row, int64_t slot) {
      STD_TORCH_CHECK(slot >= -1 && slot < adapters, op,
                      ": adapter_ids must be from -1 to one less than there are adapters");
      slots[row] = slot;
      if (slot >= 0) {
        ++ends_[slot];
      } else {
        rest_.push_back(row);
      }
    });
    std::vector<int64_t> next(adapters);
    for (int64_t slot = 0, end = 0; slot < adapters; ++slot) {
      next[slot] = end;
      end = ends_[slot] += end;
    }
    order_.resize(slots.size() - rest_.size());
    for (size_t row = 0; row < slots.size(); ++row) {
      if (slots[row] >= 0) order_[next[slots[row]]++] = static_cast<int64_t>(row);
    }
  }

  // Without those of adapters of no rank.
  Panels panels(const Adapters& adapters) const {
    Panels panels = cut_into_panels(adapters.groups(), true, [&](int64_t slot) { return ends_[slot]; });
    std::erase_if(panels.all, [&](const Panel& p) { return adapters.rank(p.group) == 0; });
    return panels;
  }

  const int64_t* order() const { return order_.data(); }

  // Clears the rows of s of those that no panel writes.
  void clear_rest(const Tensor& s, const Adapters& adapters) const {
    const int64_t size = s.size(1) * static_cast<int64_t>(s.element_size());
    char* data = static_cast<char*>(s.mutable_data_ptr());
    for (int64_t row : rest_) memset(data + row * size, 0, size);
    for (int64_t slot = 0, begin = 0; slot < adapters.groups(); begin = ends_[slot++]) {
      if (adapters.rank(slot) != 0) continue;
      for (int64_t i = begin; i < ends_[slot]; ++i) memset(data + order_[i] * size, 0, size);
    }
  }

 private:
  std::vector<int64_t> ends_, order_, rest_;
};

Tensor by_rows(const Tensor& pool) {
  return is_fp32(pool) || pool.stride(pool.dim() - 1) == 1 ? pool : torch::stable::contiguous(pool);
}

// How many of `most` ranks each adapter uses.
std::vector<int64_t> read_ranks(const char* op, const Tensor& ranks, int64_t most) {
  std::vector<int64_t> each(ranks.size(0));
  for_each_integer(ranks, [&](int64_t slot, int64_t rank) {
    STD_TORCH_CHECK(rank >= 0 && rank <= most, op, ": ranks must be from 0 to the pools' rank");
    each[slot] = rank;
  });
  return each;
}

std::vector<float> read_scalings(const Tensor& scalings) {
  const Tensor factors = torch::stable::contiguous(cast(scalings, ScalarType::Float));
  return {floats(factors), floats(factors) + factors.size(0)};
}

Adapters adapters_of(const char* op, const Tensor& lora_A, const Tensor& lora_B, const std::optional<Tensor>& ranks,
                     const std::optional<Tensor>& scalings, const std::optional<Tensor>& seed, double scaling,
                     double dropout_p) {
  Adapters adapters{{by_rows(lora_A)}, {by_rows(lora_B)}, scaling};
  if (ranks) adapters.ranks = read_ranks(op, *ranks, lora_A.size(1));
  if (scalings) adapters.scalings = read_scalings(*scalings);
  if (seed) adapters.dropout = read_dropout(*seed, dropout_p);
  return adapters;
}

// y and s of rows of x.
std::tuple<Tensor, Tensor> forward(const char* op, const Tensor& rows, const Tensor& weight, const Adapters& adapters,
                                   const Tensor& ids, const std::optional<Tensor>& bias, const std::string& schedule) {
  const Tensor s = new_empty_as(rows, {rows.size(0), adapters.rank()});
  const Slots slots(op, ids, adapters.groups());
  const Tensor y = schedule == "decode" ? decode_product(rows, weight, bias)
                                        : base_forward(rows, PlainMatrix(weight), bias, schedule);
  slots.clear_rest(s, adapters);
  slots.panels(adapters).for_each([&](const Panel& p) {
    const PanelS panel_s(adapters, rows, s, slots.order(), p);
    const FloatMatrix b = adapters.b(p.group);
    expand_panel(PanelRows(y, slots.order()), y, p, nullptr, nullptr, panel_s.data(), b.data, b.column_stride,
                 b.row_stride, adapters.rank(p.group), adapters.alpha(p.group));
  });
  return {y, s};
}

std::tuple<Tensor, Tensor> multi_lora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor adapter_ids,
                                             std::optional<Tensor> ranks, std::optional<Tensor> scalings,
                                             std::optional<Tensor> bias, std::optional<Tensor> seed, double scaling,
                                             double dropout_p, std::string schedule) {
  check_multi_lora_linear(x, weight, lora_A, lora_B, adapter_ids, ranks, scalings, bias, seed);
  const char* const op = "multi_lora_linear";
  const Adapters adapters = adapters_of(op, lora_A, lora_B, ranks, scalings, seed, scaling, dropout_p);
  const auto [y, s] = forward(op, as_rows(x), weight, adapters, adapter_ids, bias, schedule);
  return {with_leading_sizes_of(y, x), with_leading_sizes_of(s, x)};
}

// y alone, with adapters that are matrices of their own, of any ranks; a factor each.
Tensor multi_lora_apart(Tensor x, Tensor weight, std::vector<Tensor> lora_A, std::vector<Tensor> lora_B,
                        Tensor adapter_ids, std::optional<Tensor> bias, std::vector<double> scalings,
                        std::string schedule) {
  STD_TORCH_CHECK(!lora_A.empty() && lora_A.size() == lora_B.size() && lora_A.size() == scalings.size(),
                  "multi_lora_apart: lora_A, lora_B and scalings must be of as many adapters, at least one");
  check_frozen_linear(x, weight, bias);
  Adapters adapters{{}, {}, 1.0};
  for (size_t i = 0; i < lora_A.size(); ++i) {
    check_adapter(x, weight.size(0), weight.size(1), lora_A[i], lora_B[i], std::nullopt);
    adapters.lora_A.push_back(by_rows(lora_A[i]));
    adapters.lora_B.push_back(by_rows(lora_B[i]));
    adapters.ranks.push_back(lora_A[i].size(0));
    adapters.scalings.push_back(static_cast<float>(scalings[i]));
  }
  const Tensor rows = as_rows(x);
  check_ids(adapter_ids, rows.size(0));
  return with_leading_sizes_of(
      std::get<0>(forward("multi_lora_apart", rows, weight, adapters, adapter_ids, bias, schedule)), x);
}

// s alone. The order that a caller may know costs less to find again than to check.
Tensor multi_lora_shrink(Tensor x, Tensor lora_A, Tensor adapter_ids, std::optional<Tensor> ranks,
                         std::optional<Tensor>, std::optional<Tensor>, std::string) {
  check_multi_lora_shrink(x, lora_A, adapter_ids, ranks);
  const char* const op = "multi_lora_shrink";
  const Adapters adapters = adapters_of(op, lora_A, lora_A, ranks, std::nullopt, std::nullopt, 1.0, 0.0);
  const Tensor rows = as_rows(x), s = new_empty_as(rows, {rows.size(0), adapters.rank()});
  const Slots slots(op, adapter_ids, adapters.groups());
  slots.clear_rest(s, adapters);
  slots.panels(adapters).for_each([&](const Panel& p) { PanelS(adapters, rows, s, slots.order(), p); });
  return with_leading_sizes_of(s, x);
}

// y += the branch of s.
void multi_lora_expand_(Tensor y, Tensor s, Tensor lora_B, Tensor adapter_ids, std::optional<Tensor> ranks,
                        std::optional<Tensor> scalings, double scaling, std::optional<Tensor>, std::optional<Tensor>,
                        std::string) {
  check_multi_lora_expand(y, s, lora_B, adapter_ids, ranks, scalings);
  const Tensor rows = as_rows(y), s_rows = as_rows(s);
  STD_TORCH_CHECK(y.numel() == 0 || rows.const_data_ptr() == y.const_data_ptr(),
                  "multi_lora_expand_: y must be a matrix in memory");
  const char* const op = "multi_lora_expand_";
  const int64_t most = lora_B.size(2);
  Adapters adapters{{lora_B}, {by_rows(lora_B)}, scaling};  // of lora_A nobody asks more than that it is a pool
  adapters.ranks = ranks ? read_ranks(op, *ranks, most) : std::vector<int64_t>(lora_B.size(0), most);
  if (scalings) adapters.scalings = read_scalings(*scalings);
  const Slots slots(op, adapter_ids, adapters.groups());
  slots.panels(adapters).for_each([&](const Panel& p) {
    const int64_t rank = adapters.rank(p.group);
    FloatMatrix of_panel = PanelRows(s_rows, slots.order()).get(p, rank);
    if (of_panel.row_stride != rank) of_panel = by_rows(of_panel, p.rows(), rank);
    const FloatMatrix b = adapters.b(p.group);
    expand_panel(PanelRows(rows, slots.order()), rows, p, nullptr, nullptr, of_panel.data, b.data, b.column_stride,
                 b.row_stride, rank, adapters.alpha(p.group));
  });
}

std::tuple<Tensor, Tensor, Tensor> multi_lora_linear_backward(
    Tensor grad_y, Tensor x, Tensor s, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor adapter_ids,
    std::optional<Tensor> ranks, std::optional<Tensor> scalings, std::optional<Tensor> seed, double scaling,
    double dropout_p, bool need_x, bool need_A, bool need_B, std::string schedule) {
  check_multi_lora_linear(x, weight, lora_A, lora_B, adapter_ids, ranks, scalings, std::nullopt, seed);
  check_gradient(grad_y, x, s, weight.size(0), lora_A.size(1));
  const Tensor grad_rows = as_rows(grad_y), x_rows = as_rows(x), s_rows = as_rows(torch::stable::contiguous(s));
  const char* const op = "multi_lora_linear_backward";
  const Slots slots(op, adapter_ids, lora_A.size(0));
  const Adapters adapters = adapters_of(op, lora_A, lora_B, ranks, scalings, seed, scaling, dropout_p);
  const Panels panels = slots.panels(adapters);
  std::optional<Tensor> grad_x;
  if (need_x) grad_x = base_backward(grad_rows, PlainMatrix(weight), schedule);
  Gradients grads(adapters, panels, x, need_A, need_B);
  panels.for_each([&](const Panel& p) {
    add_panel_gradients(adapters, p, slots.order(), grad_rows, x_rows, s_rows, grad_x ? &*grad_x : nullptr, nullptr,
                        grads, need_A, need_B);
  });
  grads.sum();
  return {grad_x ? with_leading_sizes_of(*grad_x, x) : new_empty_as(x, {0}),
          need_A ? cast(grads.grad_A, lora_A.scalar_type()) : new_empty_as(lora_A, {0}),
          need_B ? cast(grads.grad_B, lora_B.scalar_type()) : new_empty_as(lora_B, {0})};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CPU, m) {
  m.impl("multi_lora_linear", TORCH_BOX(&multi_lora_linear));
  m.impl("multi_lora_apart", TORCH_BOX(&multi_lora_apart));
  m.impl("multi_lora_shrink", TORCH_BOX(&multi_lora_shrink));
  m.impl("multi_lora_expand_", TORCH_BOX(&multi_lora_expand_));
  m.impl("multi_lora_linear_backward", TORCH_BOX(&multi_lora_linear_backward));
}

}  // namespace lk
