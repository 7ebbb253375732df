// glibc's checked longjmp takes a jump to another stack for an error.
#undef _FORTIFY_SOURCE

#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace lk::emu {

Stacks::Stacks(int count) : guard_(sysconf(_SC_PAGESIZE)), bytes_(count * stride()) {
  void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<unsigned char*>(memory);
  for (int i = 0; i < count; ++i) mprotect(memory_ + i * stride(), guard_, PROT_NONE);
}

Stacks::~Stacks() { munmap(memory_, bytes_); }

void Fiber::prepare(unsigned char* stack, void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, kStackBytes);  // what an abandoned fiber left
#endif
  getcontext(&first_);
  first_.uc_stack.ss_sp = stack;
  first_.uc_stack.ss_size = kStackBytes;
  first_.uc_link = nullptr;
  makecontext(&first_, entry, 0);
  is_new_ = true;
  bottom_ = stack;
  bytes_ = kStackBytes;
}

void Fiber::switch_to(Fiber& to) {
  announce(to, &fake_stack_);
  if (_setjmp(context_) == 0) to.enter();
  arrived();
}

void Fiber::leave_for(Fiber& to) {
  announce(to, nullptr);
  to.enter();
}

void Fiber::arrived_from([[maybe_unused]] Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (from.bottom_ == nullptr) {
    from.bottom_ = bottom;
    from.bytes_ = bytes;
  }
#endif
}

void Fiber::enter() {
  if (is_new_) {
    is_new_ = false;
    setcontext(&first_);
  }
  _longjmp(context_, 1);
}

void Fiber::announce([[maybe_unused]] const Fiber& to, [[maybe_unused]] void** fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, to.bottom_, to.bytes_);
#endif
}

void Fiber::arrived() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
}

}  // namespace lk::emu
