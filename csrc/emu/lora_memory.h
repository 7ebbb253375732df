// What an emulated launch of a LoRA linear may touch, and results in rows that lie apart, as a caller's may.
#pragma once

#include <sys/mman.h>

#include <new>

#include "../launch/lora_problem.h"
#include "launches.h"

namespace lk {

inline void add(Memory& memory, const MemoryRef& ref) {
  if (!ref.is_written) return memory.input(ref.data, ref.element_bytes, ref.rows, ref.columns, ref.stride);
  auto* const first = static_cast<unsigned char*>(const_cast<void*>(ref.data));
  const int64_t row_bytes = ref.columns * ref.element_bytes;
  if (ref.stride == ref.columns) return memory.output(first, ref.rows * row_bytes);
  // The gaps between rows that lie apart are nobody's.
  for (int64_t row = 0; row < ref.rows; ++row) memory.output(first + row * ref.stride * ref.element_bytes, row_bytes);
}

inline int64_t row_gap = 8;  // elements: whole chunks of any element

// Rows that lie apart, as a caller's may, in the place of contiguous ones. What no row lies in takes no memory.
class RowsApart {
 public:
  RowsApart(void* rows, int64_t count, int64_t columns, int element_bytes)
      : rows_(static_cast<unsigned char*>(rows)),
        count_(columns == 0 ? 0 : count),
        stride_(columns + row_gap),
        row_bytes_(columns * element_bytes),
        stride_bytes_(stride_ * element_bytes) {
    if (count_ == 0) return;
    void* const memory =
        mmap(nullptr, bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    apart_ = static_cast<unsigned char*>(memory);
  }
  RowsApart(const RowsApart&) = delete;
  RowsApart& operator=(const RowsApart&) = delete;
  ~RowsApart() {
    if (apart_ != nullptr) munmap(apart_, bytes());
  }

  void* data() { return apart_; }
  int64_t stride() const { return stride_; }

  void copy_back() const {
    for (int64_t row = 0; row < count_; ++row) {
      std::memcpy(rows_ + row * row_bytes_, apart_ + row * stride_bytes_, row_bytes_);
    }
  }

 private:
  size_t bytes() const { return static_cast<size_t>(count_ * stride_bytes_); }

  unsigned char* const rows_;
  const int64_t count_, stride_, row_bytes_, stride_bytes_;
  unsigned char* apart_ = nullptr;
};

}  // namespace lk
