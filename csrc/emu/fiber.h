// Stacks, and flows of control that switch from one to another.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>

namespace lk::emu {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;  // red zones between variables
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

// Stacks of equal size, each above a page that must not be touched.
class Stacks {
 public:
  explicit Stacks(int count);
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks();

  unsigned char* operator[](int i) const { return memory_ + i * stride() + guard_; }

 private:
  size_t stride() const { return guard_ + kStackBytes; }

  size_t guard_, bytes_;
  unsigned char* memory_;
};

// A flow of control that others switch to. Only the first entry costs system calls.
class Fiber {
 public:
  // The next switch here calls `entry`, which must not return.
  void prepare(unsigned char* stack, void (*entry)());
  void switch_to(Fiber& to);
  [[noreturn]] void leave_for(Fiber& to);
  // To be called first by a new fiber's entry. `from` is who has started it.
  void arrived_from(Fiber& from);

 private:
  [[noreturn]] void enter();
  static void announce(const Fiber& to, void** fake_stack);
  void arrived();

  jmp_buf context_;
  ucontext_t first_;
  bool is_new_ = false;
  const void* bottom_ = nullptr;
  size_t bytes_ = 0;
  void* fake_stack_ = nullptr;
};

}  // namespace lk::emu
