// What the CUDA bindings call in libtorch_cuda, for a module that runs them over CPU tensors. One include per module.
#pragma once

#include "../bind/cuda_device.h"

extern "C" {
AOTITorchError aoti_torch_create_cuda_guard(int32_t, CUDAGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = lk::emu::runtime.stream;
  return AOTI_TORCH_SUCCESS;
}
}
