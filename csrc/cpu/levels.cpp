// What all instruction sets share: which of them the kernels run on, the best that the processor has; busy threads.
#include <cstring>
#include <initializer_list>

#include "kernels.h"

namespace adajudge {

int busy_threads = 0;  // here, as all instruction sets share it; accessed atomically (parallel.h)

namespace {

enum class Level { plain, avx2, avx512 };
const char* const NAMES[] = {"plain", "avx2", "avx512"};

struct Levels {
    const char* names[4] = {};  // of this processor's, the fastest first
    Level used = Level::plain;

    Levels() {
        int count = 0;
        for (Level level : {Level::avx512, Level::avx2, Level::plain})
            if (supported(level)) {
                if (!count) used = level;
                names[count++] = NAMES[static_cast<int>(level)];
            }
    }

    // What the compiler's x86-64-v3 and x86-64-v4 take for granted.
    static bool supported(Level level) {
#if defined(__x86_64__)
        __builtin_cpu_init();
        const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && has_f16c();
        if (level == Level::avx2) return v3;
        if (level == Level::avx512)
            return v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl");
#endif
        return level == Level::plain;
    }

#if defined(__x86_64__)
    static bool has_f16c() {  // bit 29 of ecx of leaf 1; compilers differ in whether cpu_supports knows it
        unsigned a = 1, b, c = 0, d;
        __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
        return c >> 29 & 1;
    }
#endif
};

Levels& chosen() {
    static Levels levels;
    return levels;
}

}  // namespace

const char* const* levels() { return chosen().names; }

const char* level() { return NAMES[static_cast<int>(chosen().used)]; }

bool use_level(const char* name) {
    for (Level level : {Level::plain, Level::avx2, Level::avx512})
        if (!std::strcmp(NAMES[static_cast<int>(level)], name) && Levels::supported(level)) {
            chosen().used = level;
            return true;
        }
    return false;
}

#if defined(__x86_64__)
#define ADAJUDGE_DISPATCH(name, Call)                            \
    void name(const Call& call) {                                \
        switch (chosen().used) {                                 \
            case Level::avx512: return avx512::name(call);       \
            case Level::avx2: return avx2::name(call);           \
            case Level::plain: return plain::name(call);         \
        }                                                        \
    }
#else
#define ADAJUDGE_DISPATCH(name, Call) \
    void name(const Call& call) { plain::name(call); }
#endif
ADAJUDGE_OPERATIONS(ADAJUDGE_DISPATCH)

}  // namespace adajudge
