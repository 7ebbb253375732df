// Stands in for CUDA's header where the bindings are compiled for the emulator: what they use of it, on the host.
#pragma once

#include <cstddef>
#include <cstring>

enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
using cudaStream_t = struct CUstream_st*;

namespace lk::emu {

// What the tests set and read.
struct Runtime {
  int sms = 1;
  int capability = 86;
  bool capturing = false;
  bool fail_launches = false;
  cudaStream_t stream = nullptr;
  int memsets = 0;
};

inline Runtime runtime;

}  // namespace lk::emu

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "launch failure";
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const lk::emu::Runtime& device = lk::emu::runtime;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = device.sms;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 99 << 10;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = device.capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device.capability % 10;
      break;
  }
  return cudaSuccess;
}

inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = lk::emu::runtime.capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  ++lk::emu::runtime.memsets;
  std::memset(target, value, bytes);
  return cudaSuccess;
}
