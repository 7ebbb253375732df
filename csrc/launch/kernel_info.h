// The host entry points of the CUDA kernels, a header per op: Params and a stream in, cudaError_t out. No torch.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

namespace lk {

// A kernel as far as a plan needs it.
struct KernelInfo {
  std::string name;  // mangled
  int threads;
  int shared_bytes;  // dynamic
  int cluster = 1;   // blocks of a cluster
};

}  // namespace lk
