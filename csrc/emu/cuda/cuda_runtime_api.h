// Stands in for CUDA's header where the bindings are compiled for the emulator: what they use of it, on the host.
#pragma once

#include <cstddef>
#include <cstring>
#include <utility>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorLaunchFailure = 719
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
};
using cudaStream_t = struct CUstream_st*;

namespace lk::emu {

// What the tests set and read.
struct Runtime {
  int sms = 1;
  int capability = 86;
  bool fail_launches = false;
  cudaStream_t stream = nullptr;  // the caller's
  int memsets = 0;
  cudaStream_t memset_stream = nullptr;  // of the last one
  cudaError_t last_error = cudaSuccess;  // what cudaGetLastError has not told yet
};

inline Runtime runtime;

}  // namespace lk::emu

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : error == cudaErrorLaunchFailure ? "launch failure" : "an error";
}

inline cudaError_t cudaGetLastError() { return std::exchange(lk::emu::runtime.last_error, cudaSuccess); }

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 12040;
  return cudaSuccess;
}

inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const lk::emu::Runtime& device = lk::emu::runtime;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = device.sms;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device.capability == 90 ? 227 << 10 : 99 << 10;
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

inline cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t stream) {
  ++lk::emu::runtime.memsets;
  lk::emu::runtime.memset_stream = stream;
  std::memset(target, value, bytes);
  return cudaSuccess;
}
