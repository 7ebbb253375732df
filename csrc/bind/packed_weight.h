// A packed weight: from the parts that an op is given to what the CPU kernels take, and as the weight of cpu_gemm.h's
// products, decoded a few megabytes at a time.
#pragma once

#include <cstddef>
#include <limits>
#include <memory>
#include <new>
#include <string>

#include "../cpu/kernels.h"
#include "cpu_gemm.h"
#include "rows.h"

namespace lk {

// What describes a packed weight to an op.
struct PackedArguments {
  const std::vector<Tensor>& parts;
  const std::string& layout;
  int64_t n, k, block;
  ScalarType dtype;
};

inline void check_part(const Tensor& part, ScalarType dtype, int64_t elements, const char* name) {
  STD_TORCH_CHECK(part.is_cpu() && part.is_contiguous() && part.scalar_type() == dtype && part.numel() == elements,
                  "part ", name, " of the packed weight must be contiguous on the CPU, of ", elements,
                  " elements in the layout's dtype");
}

inline const float* float_part(const Tensor& part, int64_t elements, const char* name) {
  check_part(part, ScalarType::Float, elements, name);
  return static_cast<const float*>(part.const_data_ptr());
}

inline const uint8_t* byte_part(const Tensor& part, int64_t elements, const char* name) {
  check_part(part, ScalarType::Byte, elements, name);
  return static_cast<const uint8_t*>(part.const_data_ptr());
}

// Layouts "codes4" and "codes4_low". Indices are bytes and halves of them: tables are read within their ends.
inline void set_codes4(PackedWeight& p, const std::vector<Tensor>& parts) {
  STD_TORCH_CHECK(p.block % 2 == 0 && p.k % p.block == 0,
                  "packed weight: k must be a multiple of block, and block even");
  STD_TORCH_CHECK(parts.size() == 3 || parts.size() == 6, "packed weight: expected 3 parts, or 6 where nested");
  const int64_t blocks = p.n * p.k / p.block;
  p.data = byte_part(parts[0], p.n * p.k / 2, "data");
  p.code = float_part(parts[2], 16, "code");
  p.rows_per_scale = 1;
  if (parts.size() == 3) {
    p.scales = float_part(parts[1], blocks, "scales");
    return;
  }
  p.indices = byte_part(parts[1], blocks, "scales");
  p.scales2 = float_part(parts[3], (blocks + kScalesBlock - 1) / kScalesBlock, "scales2");
  p.code2 = float_part(parts[4], 256, "code2");
  p.offset = *float_part(parts[5], 1, "offset");
}

// Layouts "int8" and "e4m3": scales are a matrix, whose shape says which rows of the weight share one.
inline void set_scaled(PackedWeight& p, const std::vector<Tensor>& parts) {
  STD_TORCH_CHECK(parts.size() == 2, "packed weight: expected 2 parts");
  const Tensor& scales = parts[1];
  const int64_t columns = (p.k + p.block - 1) / p.block, rows = scales.dim() == 2 ? scales.size(0) : -1;
  STD_TORCH_CHECK(rows == p.n || rows == (p.n + p.block - 1) / p.block || rows == 1,
                  "packed weight: scales must be [n, k / block], [n / block, k / block] or [1, k / block]");
  STD_TORCH_CHECK(scales.size(1) == columns, "packed weight: scales must have k / block columns, rounded up");
  p.data = byte_part(parts[0], p.n * p.k, "data");
  p.scales = float_part(scales, rows * columns, "scales");
  p.rows_per_scale = rows == p.n ? 1 : rows == 1 ? std::max<int64_t>(1, p.n) : p.block;
}

// Everything that decoding takes for granted.
inline PackedWeight packed_weight(const PackedArguments& w) {
  constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();  // n · k is a number, too
  STD_TORCH_CHECK(w.n >= 0 && w.k >= 0 && w.n <= kLargest && w.k <= kLargest, "packed weight: n and k are too large");
  STD_TORCH_CHECK(w.block >= 1 && w.block <= kLargest, "packed weight: block must be at least 1");
  STD_TORCH_CHECK(w.dtype == ScalarType::Float || w.dtype == ScalarType::BFloat16 || w.dtype == ScalarType::Half,
                  "packed weight: dtype must be float32, bfloat16 or float16");
  PackedWeight p{};
  p.n = w.n;
  p.k = w.k;
  p.block = w.block;
  p.rounding = float_type(w.dtype);
  if (w.layout == "codes4" || w.layout == "codes4_low") {
    p.layout = w.layout == "codes4" ? PackedLayout::kCodes4 : PackedLayout::kCodes4Low;
    set_codes4(p, w.parts);
  } else if (w.layout == "int8" || w.layout == "e4m3") {
    p.layout = w.layout == "int8" ? PackedLayout::kInt8 : PackedLayout::kE4m3;
    set_scaled(p, w.parts);
  } else {
    STD_TORCH_CHECK(false, "packed weight: layout '", w.layout, "' is not known");
  }
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
