// A packed weight: from the parts that an op is given to what the CPU kernels take, and as the weight of cpu_gemm.h's
// products, decoded a few megabytes at a time.
#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <string>

#include "../cpu/kernels.h"
#include "cpu_gemm.h"
#include "packed_parts.h"
#include "rows.h"

namespace lk {

// What describes a packed weight to an op.
struct PackedArguments {
  const std::vector<Tensor>& parts;
  const std::string& layout;
  int64_t n, k, block;
  ScalarType dtype;
};

// Everything that decoding takes for granted.
inline PackedWeight packed_weight(const PackedArguments& w) {
  STD_TORCH_CHECK(w.dtype == ScalarType::Float || w.dtype == ScalarType::BFloat16 || w.dtype == ScalarType::Half,
                  "packed weight: dtype must be float32, bfloat16 or float16");
  const PackedParts parts = packed_parts(w.parts, w.layout, w.n, w.k, w.block);
  PackedWeight p{};
  p.layout = parts.layout;
  p.data = parts.data;
  p.code = parts.code;
  p.n = parts.n;
  p.k = parts.k;
  p.block = parts.block;
  p.rows_per_scale = is_codes4(parts.layout) ? 1 : std::max(parts.block_rows, 1);
  p.rounding = float_type(w.dtype);
  if (parts.scales2 == nullptr) {
    p.scales = static_cast<const float*>(parts.scales);
    return p;
  }
  p.indices = static_cast<const uint8_t*>(parts.scales);
  p.scales2 = parts.scales2;
  p.code2 = parts.code2;
  p.offset = *parts.offset;
  return p;
}

// x (or the gradient of y) [..., columns] beside a packed weight that has so many.
inline void check_packed_rows(const Tensor& x, int64_t columns) {
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) == columns,
                  "x must be [..., k], and the gradient of y [..., n], of a packed weight [n, k]");
}

// W as an x of this dtype is multiplied by it: rounded to x's 16 bits, once, where x has 16.
inline PackedWeight packed_weight_for(const PackedArguments& arguments, ScalarType x_dtype) {
  STD_TORCH_CHECK(x_dtype == ScalarType::Float || x_dtype == ScalarType::BFloat16 || x_dtype == ScalarType::Half,
                  "packed weight: x must be float32, bfloat16 or float16");
  PackedWeight p = packed_weight(arguments);
  if (x_dtype != ScalarType::Float) p.rounding = float_type(x_dtype);
  return p;
}

// Memory for the length of a call. Up to kKept bytes are the thread's own and stay with it: of torch's allocator, they
// would come from the system and go back to it, at a page fault for every 4 KB of every call. A thread holds one
// Scratch at a time. The thread of a backward is another one than that of the forward, and so has another.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    thread_local Memory kept;
    thread_local int64_t kept_bytes = 0;
    if (bytes > kKept) {
      own_ = allocate(bytes);
      data_ = own_.get();
      return;
    }
    if (bytes > kept_bytes) {
      kept.reset();
      kept_bytes = 0;
      kept = allocate(bytes);
      kept_bytes = bytes;
    }
    data_ = kept.get();
  }

  void* data() const { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  static constexpr int64_t kKept = kUpcastWeightElements * sizeof(float);

  struct Free {
    void operator()(std::byte* memory) const { ::operator delete(memory, kLine); }
  };
  using Memory = std::unique_ptr<std::byte, Free>;

  static Memory allocate(int64_t bytes) { return Memory(static_cast<std::byte*>(::operator new(bytes, kLine))); }

  Memory own_;
  void* data_;
};

// Decodes rows [begin, end) of W into `out`, in fp32 or in the 16-bit type that they are rounded to.
inline void unpack_rows(const PackedWeight& w, void* out, bool is_narrow, int64_t begin, int64_t end) {
  constexpr int64_t kThreadElements = 1 << 15;  // elements that are worth a thread
  const UnpackParams p{.weight = w, .out = out, .first_row = begin, .is_narrow = is_narrow};
  torch::stable::parallel_for(begin, end, std::max<int64_t>(1, kThreadElements / std::max<int64_t>(1, w.k)),
                              [&](int64_t first, int64_t last) { cpu::kernels().packed->unpack(p, first, last); });
}

// The weight of a product, decoded panel by panel into one buffer.
class PackedMatrix {
 public:
  explicit PackedMatrix(const PackedWeight& weight) : weight_(weight) {}

  int64_t n() const { return weight_.n; }
  int64_t k() const { return weight_.k; }

  // Calls f(rows of W in this dtype, row begin, row end), once at least.
  template <class F>
  void for_panels(ScalarType dtype, const F& f) const {
    const bool is_narrow = dtype != ScalarType::Float;
    const int64_t step = std::min(panel_rows(weight_.k), weight_.n);
    const Scratch buffer(step * weight_.k * (is_narrow ? 2 : 4));
    int64_t begin = 0;
    do {
      const int64_t end = std::min(weight_.n, begin + step);
      unpack_rows(weight_, buffer.data(), is_narrow, begin, end);
      f(torch::stable::from_blob(buffer.data(), {end - begin, weight_.k}, {std::max<int64_t>(1, weight_.k), 1},
                                 torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype),
        begin, end);
      begin = end;
    } while (begin < weight_.n);
  }

 private:
  PackedWeight weight_;
};

}  // namespace lk
