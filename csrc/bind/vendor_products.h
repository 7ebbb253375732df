// The vendor's products, by way of torch, and who asks for them.
#pragma once

#include <string>

#include "../config/lora_linear.h"
#include "aten.h"
#include "cuda_device.h"

namespace lk {

inline Wanted wanted(const std::string& schedule) {
  const std::optional<Wanted> known = wanted_by(schedule);
  STD_TORCH_CHECK(known.has_value(), "schedule must be ", kWantedNames, ", got \"", schedule, "\"");
  return *known;
}

// out = a b, by the vendor's GEMM.
inline void product(const Tensor& out, const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(aoti_torch_cuda_mm_out != nullptr, "this torch has no aoti_torch_cuda_mm_out");
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()));
}

// The same + the elements of addend from `begin` on, as many as out has columns; without them, where there are none.
inline void product(const Tensor& out, const Tensor& a, const Tensor& b, const std::optional<Tensor>& addend,
                    int64_t begin) {
  if (!addend) return product(out, a, b);
  STD_TORCH_CHECK(aoti_torch_cuda_addmm_out != nullptr, "this torch has no aoti_torch_cuda_addmm_out");
  const int64_t count = out.size(1), one = 1;
  AtenTensorHandle part;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(addend->get(), 1, &count, &one, begin, &part));
  const Tensor row(part);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), row.get(), a.get(), b.get(), 1.0, 1.0));
}

// out += a b.
inline void accumulate_product(const Tensor& out, const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(aoti_torch_cuda_addmm_out != nullptr, "this torch has no aoti_torch_cuda_addmm_out");
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
}

// Whether this torch offers it to extensions, as it does from 2.12 on.
inline bool has_grouped_product() {
  const auto is_there = [](const void* function) { return function != nullptr; };
  return is_there(reinterpret_cast<const void*>(&aoti_torch_cuda__grouped_mm));
}

// The rows of each group times its own of matrices [groups, k, n]; rows behind the last end are anything.
inline Tensor grouped_product(const Tensor& rows, const Tensor& matrices, const Tensor& ends) {
  AtenTensorHandle offsets = ends.get(), out;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cuda__grouped_mm(rows.get(), matrices.get(), &offsets, nullptr, nullptr, &out));
  return Tensor(out);
}

}  // namespace lk
