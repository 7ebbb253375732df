// The ticket counters of a launch: words that are zero before it and that the kernel leaves zero.
#pragma once

#include <algorithm>
#include <bit>
#include <map>
#include <mutex>
#include <utility>

#include "aten.h"
#include "cuda_device.h"

namespace lk {

class Counters {
 public:
  // `words` counters on the device of `like`, zero by the time the call's stream reaches the launch.
  Counters(const Tensor& like, const CudaCall& call, int64_t words)
      : key_(call.device, call.stream), words_(is_captured(call.stream) ? fresh(like, words) : cached(like, words)) {}

  uint32_t* data() const { return static_cast<uint32_t*>(words_.mutable_data_ptr()); }

  // Takes what the launch returned. One that failed may leave counts behind, which no later launch may see.
  void check(cudaError_t error, const char* op) const {
    if (error != cudaSuccess) {
      const std::lock_guard lock(cache().mutex);
      cache().words.erase(key_);
    }
    check_cuda(error, op);
  }

 private:
  using Key = std::pair<int32_t, cudaStream_t>;
  struct Cache {
    std::mutex mutex;
    std::map<Key, Tensor> words;
  };

  // Never destroyed: when the process ends, the allocator of its tensors may be gone first.
  static Cache& cache() {
    static Cache* const cache = new Cache;
    return *cache;
  }

  static bool is_captured(cudaStream_t stream) {
    cudaStreamCaptureStatus status;
    check_cuda(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
    return status != cudaStreamCaptureStatusNone;
  }

  // Under capture the zeroing becomes a node of the graph, in front of the kernel at every replay.
  Tensor fresh(const Tensor& like, int64_t words) const {
    const Tensor t = new_empty_as(like, {words}, ScalarType::Int);
    if (words == 0) return t;
    check_cuda(cudaMemsetAsync(t.mutable_data_ptr(), 0, words * sizeof(uint32_t), key_.second), "cudaMemsetAsync");
    return t;
  }

  // The launches of a stream follow each other and may share their counters. An outgrown tensor is held by the calls
  // that still use it; then torch's allocator hands its memory out again in the order of this same stream.
  Tensor cached(const Tensor& like, int64_t words) const {
    constexpr int64_t kFewest = 1024;
    {
      const std::lock_guard lock(cache().mutex);
      const auto entry = cache().words.find(key_);
      if (entry != cache().words.end() && entry->second.size(0) >= words) return entry->second;
    }
    // Not under the lock: an allocator that runs out of memory may call Python. If two threads come here, each uses
    // its own tensor, and the later one stays.
    const auto size = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max(words, kFewest))));
    const Tensor t = fresh(like, size);
    const std::lock_guard lock(cache().mutex);
    cache().words.insert_or_assign(key_, t);
    return t;
  }

  Key key_;
  Tensor words_;
};

}  // namespace lk
