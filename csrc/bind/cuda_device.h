// Device and stream of a call, and the device's limits. Device and stream come through the C shims of the stable ABI,
// which live in libtorch_cuda: declared weak, they are null in a CPU build of torch, where this module still loads.
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
}

namespace lk {

// Makes t's device current for the lifetime of the object; `stream` is its current stream.
class CudaCall {
 public:
  explicit CudaCall(const torch::stable::Tensor& t) : device(t.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(device, &guard_));
    void* current;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
    stream = static_cast<cudaStream_t>(current);
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

// Asked for once per device.
inline DeviceLimits device_limits(int32_t device) {
  static std::mutex mutex;
  static std::map<int32_t, DeviceLimits> known;
  const std::lock_guard lock(mutex);
  const auto entry = known.find(device);
  if (entry != known.end()) return entry->second;
  const auto attribute = [&](cudaDeviceAttr which) {
    int value;
    check_cuda(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
    return value;
  };
  const DeviceLimits limits{.sms = attribute(cudaDevAttrMultiProcessorCount),
                            .shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  return known.emplace(device, limits).first->second;
}

}  // namespace lk
