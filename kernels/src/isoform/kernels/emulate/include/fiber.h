// Fibers: stacks of their own that take turns on one processor thread.
//
// Each thread of a CUDA block is one. A fiber runs until it calls `suspend`, which returns to the
// scheduler; `resume` lets it go on. A switch saves the registers that a call must preserve, stores
// the stack pointer and loads another: some ten nanoseconds, where `swapcontext` makes two system
// calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#define ISOFORM_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ISOFORM_ADDRESS_SANITIZER 1
#endif
#endif
#if defined(ISOFORM_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

extern "C" void isoform_switch_stack(void** save, void* load);

#if defined(__x86_64__)
asm(R"(
    .text
    .globl isoform_switch_stack
    .hidden isoform_switch_stack
    .type isoform_switch_stack, @function
isoform_switch_stack:
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
    .size isoform_switch_stack, . - isoform_switch_stack
)");
#elif defined(__aarch64__)
asm(R"(
    .text
    .globl isoform_switch_stack
    .hidden isoform_switch_stack
    .type isoform_switch_stack, %function
isoform_switch_stack:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size isoform_switch_stack, . - isoform_switch_stack
)");
#else
#error "the emulator switches stacks on x86-64 and aarch64 only: run it on one of these"
#endif

namespace isoform::emulate {

struct Fiber {
    char* stack = nullptr;
    void* stack_pointer = nullptr;
    void* sanitizer_stack = nullptr;
};

constexpr std::size_t STACK_BYTES = 256 << 10;
constexpr std::size_t GUARD_BYTES = 64 << 10;  // a multiple of every page size

static void* scheduler_stack_pointer;
#if defined(ISOFORM_ADDRESS_SANITIZER)
static void* scheduler_sanitizer_stack;
static const void* scheduler_stack;
static std::size_t scheduler_stack_bytes;
#endif

// A stack is made at a fiber's first use in a launch; false where there is no memory for it. Running
// past its end hits unmapped memory.
inline bool give_stack(Fiber& fiber) {
    if (fiber.stack != nullptr) {
        return true;
    }
    void* memory = mmap(nullptr, GUARD_BYTES + STACK_BYTES, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        return false;
    }
    fiber.stack = static_cast<char*>(memory) + GUARD_BYTES;
    return mprotect(memory, GUARD_BYTES, PROT_NONE) == 0;
}

// Every library has stacks of its own, of two maps each, and a process may have some 65,000 maps: kept
// until the end, the stacks of a hundred variants would be all of them.
inline void take_stack(Fiber& fiber) {
    if (fiber.stack == nullptr) {
        return;
    }
#if defined(ISOFORM_ADDRESS_SANITIZER)
    ASAN_UNPOISON_MEMORY_REGION(fiber.stack, STACK_BYTES);
#endif
    munmap(fiber.stack - GUARD_BYTES, GUARD_BYTES + STACK_BYTES);
    fiber.stack = nullptr;
}

// Lay out the stack as if `entry` had just been called; `entry` must never return. False where there
// is no memory for a stack.
inline bool prepare(Fiber& fiber, void (*entry)(), unsigned number) {
    if (!give_stack(fiber)) {
        return false;
    }
#if defined(ISOFORM_ADDRESS_SANITIZER)
    ASAN_UNPOISON_MEMORY_REGION(fiber.stack, STACK_BYTES);
    fiber.sanitizer_stack = nullptr;
#endif
    // Stacks start at different offsets, or equal frames of all fibers would share cache sets.
    char* top = fiber.stack + STACK_BYTES - 64 * (1 + number % 32);
    auto* words = reinterpret_cast<std::uintptr_t*>(top);
#if defined(__x86_64__)
    *--words = 0;  // where the return address of `entry` would be: keeps the stack aligned
    *--words = reinterpret_cast<std::uintptr_t>(entry);
    words -= 6;
    std::memset(words, 0, 6 * sizeof *words);
#else
    words -= 20;
    std::memset(words, 0, 20 * sizeof *words);
    words[11] = reinterpret_cast<std::uintptr_t>(entry);  // x30, where `ret` goes
#endif
    fiber.stack_pointer = words;
    return true;
}

// From the scheduler to the fiber, until it suspends.
inline void resume(Fiber& fiber) {
#if defined(ISOFORM_ADDRESS_SANITIZER)
    __sanitizer_start_switch_fiber(&scheduler_sanitizer_stack, fiber.stack, STACK_BYTES);
#endif
    isoform_switch_stack(&scheduler_stack_pointer, fiber.stack_pointer);
#if defined(ISOFORM_ADDRESS_SANITIZER)
    __sanitizer_finish_switch_fiber(scheduler_sanitizer_stack, nullptr, nullptr);
#endif
}

// First thing a fiber does.
inline void entered(Fiber& fiber) {
#if defined(ISOFORM_ADDRESS_SANITIZER)
    __sanitizer_finish_switch_fiber(fiber.sanitizer_stack, &scheduler_stack,
                                    &scheduler_stack_bytes);
#else
    (void)fiber;
#endif
}

// From the fiber back to the scheduler.
inline void suspend(Fiber& fiber) {
#if defined(ISOFORM_ADDRESS_SANITIZER)
    __sanitizer_start_switch_fiber(&fiber.sanitizer_stack, scheduler_stack, scheduler_stack_bytes);
#endif
    isoform_switch_stack(&fiber.stack_pointer, scheduler_stack_pointer);
    entered(fiber);
}

}  // namespace isoform::emulate
