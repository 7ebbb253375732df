// The counters of a launch: words that are zero before it.
#pragma once

#include <optional>

#include "aten.h"
#include "cuda_device.h"

namespace lk {

// They come from torch's allocator for one call, and a memset on the call's stream zeroes them: nothing outlives the
// call. What did would be memory of whichever pool the call ran in, and CUDA graph trees and pools that give their
// pages back hand that to others or lose its zeros; it would be shared by the streams that get a handle one after the
// other; and a launch that failed would leave its counts in it. Under capture the memset is a node of the graph, in
// front of the kernel at every replay.
class Counters {
 public:
  // `words` counters on the device of `like`, zero by the time the call's stream reaches the launch.
  Counters(const Tensor& like, const CudaCall& call, int64_t words) {
    if (words == 0) return;
    words_ = new_empty_as(like, {words}, ScalarType::Int);
    check_cuda(cudaMemsetAsync(data(), 0, words * sizeof(uint32_t), call.stream), "cudaMemsetAsync");
  }

  // Null if there are none.
  uint32_t* data() const { return words_ ? static_cast<uint32_t*>(words_->mutable_data_ptr()) : nullptr; }

 private:
  std::optional<Tensor> words_;
};

}  // namespace lk
