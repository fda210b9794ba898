// What all instruction sets share: which of them the kernels run on, the best that the processor has; busy threads.
#include <cstring>

#include "kernels.h"

namespace adajudge {

int busy_threads = 0;  // here, as all instruction sets share it; accessed atomically (parallel.h)

namespace {

struct Levels {
    const char* names[4] = {};
    const char* used;

    Levels() {
        int count = 0;
#if defined(__x86_64__)
        __builtin_cpu_init();
        const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && has_f16c();
        if (v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vl"))
            names[count++] = "avx512";
        if (v3) names[count++] = "avx2";
#endif
        names[count] = "plain";
        used = names[0];
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

const char* level() { return chosen().used; }

bool use_level(const char* name) {
    for (const char* const* known = levels(); *known; ++known)
        if (!std::strcmp(*known, name)) {
            chosen().used = *known;
            return true;
        }
    return false;
}

#if defined(__x86_64__)
#define ADAJUDGE_DISPATCH(name, Call)                        \
    void name(const Call& call) {                            \
        switch (level()[3]) {                                \
            case '5': return avx512::name(call);             \
            case '2': return avx2::name(call);               \
            default: return plain::name(call);               \
        }                                                    \
    }
#else
#define ADAJUDGE_DISPATCH(name, Call) \
    void name(const Call& call) { plain::name(call); }
#endif
ADAJUDGE_OPERATIONS(ADAJUDGE_DISPATCH)

}  // namespace adajudge
