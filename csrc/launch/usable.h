// Whether the current device runs this module's kernels. Host only.
#pragma once

#include <string>

#include "dropout_mask.h"

namespace lk {

struct Usability {
  const char* problem;  // none: empty; "driver", "architecture" or "other"
  std::string detail;
};

inline std::string cuda_version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// A kernel is looked for, which needs a driver that takes this runtime and code for this device. Versions are told, not
// compared: a driver of an older minor version runs machine code of a newer one, but compiles no PTX of it.
inline Usability usability() {
  const cudaError_t error = find_dropout_mask_kernel();
  if (error == cudaSuccess) return {"", ""};
  cudaGetLastError();  // the next launch would return it
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  const std::string detail = std::string(cudaGetErrorString(error)) + " (driver for CUDA " + cuda_version_text(driver) +
                             ", runtime " + cuda_version_text(runtime) + ")";
  switch (error) {
    case cudaErrorInsufficientDriver:
    case cudaErrorUnsupportedPtxVersion:
      return {"driver", detail};
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      return {"architecture", detail};
    default:
      return {"other", detail};
  }
}

}  // namespace lk
