// Device and stream of a call, and the device's limits. Device, stream and the vendor's GEMM come through the C shims
// of the stable ABI, which live in libtorch_cuda: declared weak, they are null in a CPU build of torch, where this
// module still loads.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/tensor.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "../config/tiles.h"

extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_create_cuda_guard(int32_t, CUDAGuardHandle*);
__attribute__((weak)) AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle);
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
__attribute__((weak)) AOTITorchError aoti_torch_cuda_mm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                            AtenTensorHandle mat2);
__attribute__((weak)) AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                               AtenTensorHandle mat1, AtenTensorHandle mat2,
                                                               double beta, double alpha);
__attribute__((weak)) AOTITorchError aoti_torch_cuda__grouped_mm(AtenTensorHandle self, AtenTensorHandle mat2,
                                                                 AtenTensorHandle* offs, AtenTensorHandle* bias,
                                                                 int32_t* out_dtype, AtenTensorHandle* result);
}

namespace lk {

// Makes t's device current for the lifetime of the object; `stream` is its current stream.
class CudaCall {
 public:
  explicit CudaCall(const torch::stable::Tensor& t) : device(t.get_device_index()) {
    void* current;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
    stream = static_cast<cudaStream_t>(current);
    // Last: behind what may throw, as nothing deletes the guard of an object that has not come to be.
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(device, &guard_));
  }
  CudaCall(const CudaCall&) = delete;
  CudaCall& operator=(const CudaCall&) = delete;
  ~CudaCall() { aoti_torch_delete_cuda_guard(guard_); }

  const int32_t device;
  cudaStream_t stream;

 private:
  CUDAGuardHandle guard_;
};

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Of each device, asked for once.
class KnownLimits {
 public:
  DeviceLimits of(int32_t device) {
    const std::lock_guard lock(mutex_);
    const auto entry = known_.find(device);
    if (entry != known_.end()) return entry->second;
    const auto attribute = [&](cudaDeviceAttr which) {
      int value;
      check_cuda(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
      return value;
    };
    const DeviceLimits limits{
        .sms = attribute(cudaDevAttrMultiProcessorCount),
        .shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
        .capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor)};
    return known_.emplace(device, limits).first->second;
  }

  // The emulator's device changes.
  void forget() {
    const std::lock_guard lock(mutex_);
    known_.clear();
  }

 private:
  std::mutex mutex_;
  std::map<int32_t, DeviceLimits> known_;
};

inline KnownLimits known_limits;

inline DeviceLimits device_limits(int32_t device) { return known_limits.of(device); }

}  // namespace lk
