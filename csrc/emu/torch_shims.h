// What the CUDA bindings call in libtorch_cuda, for a module that runs them over CPU tensors. One include per module.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <cstring>

#include "../bind/cuda_device.h"

namespace lk {

// As the vendor's GEMM takes its operands where torch allows tf32: to nearest, ties away from zero.
inline torch::stable::Tensor rounded_to_tf32(AtenTensorHandle t) {
  AtenTensorHandle copy;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(t, &copy));
  torch::stable::Tensor rounded = torch::stable::clone(torch::stable::Tensor(copy));
  if (rounded.scalar_type() != torch::headeronly::ScalarType::Float) return rounded;
  auto* const bits = static_cast<uint32_t*>(rounded.mutable_data_ptr());
  for (int64_t i = 0; i < rounded.numel(); ++i) bits[i] = (bits[i] + 0x1000u) & ~0x1FFFu;
  return rounded;
}

}  // namespace lk

extern "C" {
// From torch 2.12 on.
__attribute__((weak)) AOTITorchError aoti_torch_cpu__grouped_mm(AtenTensorHandle self, AtenTensorHandle mat2,
                                                                AtenTensorHandle* offs, AtenTensorHandle* bias,
                                                                int32_t* out_dtype, AtenTensorHandle* result);

AOTITorchError aoti_torch_create_cuda_guard(int32_t, CUDAGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = lk::emu::runtime.stream;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_cuda_mm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat2) {
  const torch::stable::Tensor a = lk::rounded_to_tf32(self), b = lk::rounded_to_tf32(mat2);
  return aoti_torch_cpu_mm_out(out, a.get(), b.get());
}
// What lies behind the last group is whatever memory held.
AOTITorchError aoti_torch_cuda__grouped_mm(AtenTensorHandle self, AtenTensorHandle mat2, AtenTensorHandle* offs,
                                           AtenTensorHandle* bias, int32_t* out_dtype, AtenTensorHandle* result) {
  if (aoti_torch_cpu__grouped_mm == nullptr) return AOTI_TORCH_FAILURE;
  const AOTITorchError error = aoti_torch_cpu__grouped_mm(self, mat2, offs, bias, out_dtype, result);
  if (error != AOTI_TORCH_SUCCESS) return error;
  AtenTensorHandle handles[2];
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(*result, &handles[0]));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(*offs, &handles[1]));
  const torch::stable::Tensor rows(handles[0]), ends(handles[1]);
  const int32_t last = static_cast<const int32_t*>(ends.const_data_ptr())[ends.numel() - 1];
  const int64_t row_bytes = rows.size(1) * static_cast<int64_t>(rows.element_size());
  std::memset(static_cast<char*>(rows.mutable_data_ptr()) + last * row_bytes, 0xFF, (rows.size(0) - last) * row_bytes);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat1,
                                         AtenTensorHandle mat2, double beta, double alpha) {
  const torch::stable::Tensor a = lk::rounded_to_tf32(mat1), b = lk::rounded_to_tf32(mat2);
  return aoti_torch_cpu_addmm_out(out, self, a.get(), b.get(), beta, alpha);
}
}
