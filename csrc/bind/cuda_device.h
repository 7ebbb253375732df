// Device and stream of a call, through the C shims of the stable ABI. The shims live in libtorch_cuda: declared weak,
// they are null in a CPU build of torch, where this module still loads.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_create_cuda_guard(int32_t, CUDAGuardHandle*);
__attribute__((weak)) AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle);
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
}

namespace lk {

// Makes t's device current for the lifetime of the object; `stream` is its current stream.
class CudaCall {
 public:
  explicit CudaCall(const torch::stable::Tensor& t) {
    const int32_t device = t.get_device_index();
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(device, &guard_));
    void* current;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
    stream = static_cast<cudaStream_t>(current);
  }
  CudaCall(const CudaCall&) = delete;
  CudaCall& operator=(const CudaCall&) = delete;
  ~CudaCall() { aoti_torch_delete_cuda_guard(guard_); }

  cudaStream_t stream;

 private:
  CUDAGuardHandle guard_;
};

inline void check_launch(cudaError_t error, const char* op) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

}  // namespace lk
