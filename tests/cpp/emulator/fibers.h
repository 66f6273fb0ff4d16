// Fibers: functions with stacks of their own that take turns on one OS thread.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace longrope_emulator {

constexpr size_t kStackBytes = 128 << 10;

#if defined(__x86_64__)

// What is kept of a fiber that waits: its stack pointer, with the registers that a call preserves
// above it.
struct Context {
  void* stack_pointer = nullptr;
};

// Saves the running fiber in *from and goes on in *to.
__attribute__((naked, noinline)) inline void switch_context(Context* /*from*/, Context* /*to*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq (%rsi), %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "ret\n");
}

inline void make_context(Context* context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // where entry would return to, and the alignment that a call leaves
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context->stack_pointer = top;
}

#else

struct Context {
  ucontext_t state;
};

inline void switch_context(Context* from, Context* to) { swapcontext(&from->state, &to->state); }

inline void make_context(Context* context, char* stack, void (*entry)()) {
  getcontext(&context->state);
  context->state.uc_stack.ss_sp = stack;
  context->state.uc_stack.ss_size = kStackBytes;
  context->state.uc_link = nullptr;
  makecontext(&context->state, entry, 0);
}

#endif

// The memory of a fiber's stack. It takes no more than what is touched of it.
class Stack {
 public:
  Stack() {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    mprotect(memory_, 4096, PROT_NONE);  // an overflow faults instead of running into another
  }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  ~Stack() { munmap(memory_, kStackBytes); }
  char* memory() const { return memory_; }

 private:
  char* memory_;
};

}  // namespace longrope_emulator
