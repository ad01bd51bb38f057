// Fibers: the stacks of the threads of a block, kept for the next block, and the switch between them.
#include <sys/mman.h>

#include <cstdlib>
#include <new>

#include "machine.h"

#if !defined(__x86_64__)
#  include <ucontext.h>
#endif

namespace shim {

namespace {
constexpr size_t kGuard = 4096;

// One mapping for all, each stack above a page that cannot be touched; the system gives memory to what is used.
uintptr_t stack_of(unsigned thread) {
  static unsigned char* stacks = [] {
    const size_t bytes = kMaxThreads * (kStack + kGuard);
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    auto* base = static_cast<unsigned char*>(p);
    for (unsigned i = 0; i < kMaxThreads; ++i) mprotect(base + i * (kStack + kGuard), kGuard, PROT_NONE);
    return base;
  }();
  return reinterpret_cast<uintptr_t>(stacks) + thread * (kStack + kGuard) + kGuard;
}
}  // namespace

#if defined(__x86_64__)

// Saves what a called function must preserve, and exchanges the stacks.
extern "C" void shim_switch(void** save, void* to);
asm(R"(
.text
.hidden shim_switch
.globl shim_switch
.type shim_switch, @function
shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size shim_switch, .-shim_switch
)");

namespace {
void* scheduler_stack;

// Stacks that all ended at one offset in their page would push each other out of the few cache lines of that offset.
size_t colour(unsigned thread) { return thread * 320 % 4096; }
}  // namespace

void start_fiber(Thread& thread, void (*entry)()) {
  thread.stack = stack_of(thread.linear);
  // entry() finds the stack as after a call: 8 below a multiple of 16, at its (never used) return address
  void** top = reinterpret_cast<void**>(thread.stack + kStack - colour(thread.linear));
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  thread.stack_pointer = top;
}

void resume(Thread& thread) {
  running = &thread;
  shim_switch(&scheduler_stack, thread.stack_pointer);
  running = nullptr;
}

void leave() { shim_switch(&running->stack_pointer, scheduler_stack); }

#else

namespace {
ucontext_t scheduler_context;
ucontext_t contexts[kMaxThreads];
}  // namespace

void start_fiber(Thread& thread, void (*entry)()) {
  thread.stack = stack_of(thread.linear);
  ucontext_t& context = contexts[thread.linear];
  getcontext(&context);
  context.uc_stack.ss_sp = reinterpret_cast<void*>(thread.stack);
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

void resume(Thread& thread) {
  running = &thread;
  swapcontext(&scheduler_context, &contexts[thread.linear]);
  running = nullptr;
}

void leave() { swapcontext(&contexts[running->linear], &scheduler_context); }

#endif

}  // namespace shim
