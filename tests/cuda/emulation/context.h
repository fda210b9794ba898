// A thread of execution with a stack of its own, to be switched to and from.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
// ucontext asks the system for the signal mask at every switch: a hundred times slower.
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.globl emulation_switch
emulation_switch:
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
)");

namespace emulation {

class Context {
public:
    void start_at(void (*function)(), char* stack, std::size_t size) {
        auto top = reinterpret_cast<uint64_t*>(stack + size);  // a multiple of 16
        *--top = 0;                                            // where `function` would return to: it never does
        *--top = reinterpret_cast<uint64_t>(function);
        for (int saved = 0; saved < 6; ++saved) *--top = 0;
        stack_pointer_ = top;
    }
    static void swap(Context& from, Context& to) { emulation_switch(&from.stack_pointer_, to.stack_pointer_); }

private:
    void* stack_pointer_ = nullptr;
};

}  // namespace emulation

#else
#include <ucontext.h>

namespace emulation {

class Context {
public:
    void start_at(void (*function)(), char* stack, std::size_t size) {
        getcontext(&context_);
        context_.uc_stack = {stack, 0, size};
        context_.uc_link = nullptr;
        makecontext(&context_, function, 0);
    }
    static void swap(Context& from, Context& to) { swapcontext(&from.context_, &to.context_); }

private:
    ucontext_t context_;
};

}  // namespace emulation
#endif
