// The few ATen calls of the ops of any device, on plain 2-D tensors, through the C shims of the stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

namespace lk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Whether t is on x's device: kernels take tensors by their addresses. An op that is called with some tensors on the
// CPU and some elsewhere does not come to the CPU's kernels.
inline bool is_beside(const Tensor& x, const Tensor& t) { return x.is_cpu() || t.device() == x.device(); }
inline bool is_beside(const Tensor& x, const std::optional<Tensor>& t) { return !t || is_beside(x, *t); }

inline bool is_fp32(const Tensor& t) { return t.scalar_type() == ScalarType::Float; }
inline bool is_integer(const Tensor& t) {
  return t.scalar_type() == ScalarType::Int || t.scalar_type() == ScalarType::Long;
}

// Of the leading dimensions.
inline int64_t rows_of(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) rows *= t.size(d);
  return rows;
}

// An argument that may not be given.
inline std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  return !t || t->is_contiguous() ? t : std::optional(torch::stable::contiguous(*t));
}

// A [rows, columns] view with these strides, starting `offset` elements after t's first.
inline Tensor view2d(const Tensor& t, std::array<int64_t, 2> sizes, std::array<int64_t, 2> strides,
                     int64_t offset = 0) {
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes.data(), strides.data(), offset, &out));
  return Tensor(out);
}

inline Tensor transposed(const Tensor& t) { return view2d(t, {t.size(1), t.size(0)}, {t.stride(1), t.stride(0)}); }

inline Tensor row_block(const Tensor& t, int64_t begin, int64_t end) {
  return view2d(t, {end - begin, t.size(1)}, {t.stride(0), t.stride(1)}, begin * t.stride(0));
}

inline Tensor column_block(const Tensor& t, int64_t begin, int64_t end) {
  if (end - begin == t.size(1)) return t;
  return view2d(t, {t.size(0), end - begin}, {t.stride(0), t.stride(1)}, begin * t.stride(1));
}

// Strides of a contiguous tensor of these sizes.
template <class Sizes>
void set_strides(const Sizes& size, size_t dim, Sizes& stride) {
  if (dim > 0) stride[dim - 1] = 1;
  for (size_t d = dim; d-- > 1;) stride[d - 1] = stride[d] * std::max<int64_t>(size[d], 1);
}

// Contiguous, on like's device; dtype defaults to like's. The shim allocates without a trip through the dispatcher.
inline Tensor new_empty_as(const Tensor& like, const int64_t* size, const int64_t* stride, size_t dim,
                           std::optional<ScalarType> dtype = {}) {
  int32_t like_dtype, device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &like_dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  if (dtype) like_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(dim), size, stride, like_dtype,
                                                         device_type, like.get_device_index(), &out));
  return Tensor(out);
}

inline Tensor new_empty_as(const Tensor& like, std::initializer_list<int64_t> sizes,
                           std::optional<ScalarType> dtype = {}) {
  std::array<int64_t, 6> size{}, stride{};
  std::copy(sizes.begin(), sizes.end(), size.begin());
  set_strides(size, sizes.size(), stride);
  return new_empty_as(like, size.data(), stride.data(), sizes.size(), dtype);
}

// [..., columns] with like's leading sizes.
inline Tensor new_empty_rows_as(const Tensor& like, int64_t columns) {
  std::vector<int64_t> size(like.sizes().begin(), like.sizes().end()), stride(size.size());
  size.back() = columns;
  set_strides(size, size.size(), stride);
  return new_empty_as(like, size.data(), stride.data(), size.size());
}

// [..., n] -> [rows, n] with unit column stride: a view where the strides allow it, else a copy.
inline Tensor as_rows(const Tensor& t) {
  const int64_t dim = t.dim(), columns = t.size(dim - 1), rows = rows_of(t);
  if (rows == 0 || columns == 0) return torch::stable::new_empty(t, {rows, columns});

  bool mergeable = t.stride(dim - 1) == 1 || columns == 1;
  int64_t row_stride = columns;
  bool found = false;
  for (int64_t d = dim - 2, expected = 0; d >= 0 && mergeable; --d) {
    if (t.size(d) == 1) continue;
    if (!found) {
      row_stride = t.stride(d);
      found = true;
    } else if (t.stride(d) != expected) {
      mergeable = false;
    }
    expected = t.stride(d) * t.size(d);
  }
  // BLAS wants a row stride of at least one row: expanded rows (stride 0) are copied.
  if (mergeable && row_stride >= columns) {
    const bool is_view = dim == 2 && t.stride(0) == row_stride && t.stride(1) == 1;
    return is_view ? t : view2d(t, {rows, columns}, {row_stride, 1});
  }
  return view2d(torch::stable::contiguous(t), {rows, columns}, {columns, 1});
}

// [rows, n] contiguous, shown as `like`'s leading dimensions and n columns.
inline Tensor with_leading_sizes_of(const Tensor& rows, const Tensor& like) {
  const int64_t dim = like.dim();
  if (dim == 2) return rows;
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end()), strides(dim);
  sizes.back() = rows.size(1);
  set_strides(sizes, dim, strides);
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(rows.get(), dim, sizes.data(), strides.data(), 0, &out));
  return Tensor(out);
}

inline Tensor cast(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

}  // namespace lk
