// Work cut into pieces for OpenMP's threads, and scratch memory. A piece's result must not depend on its thread.
#pragma once

#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstddef>
#include <cstdint>
#include <new>

namespace adajudge {
extern int busy_threads;  // of the process, in kernels (levels.cpp)
}

namespace {

// A thread is woken for so many numbers that are read or written; fewer are faster without it.
constexpr int64_t NUMBERS_PER_THREAD = 1 << 15;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
inline int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

inline int threads_for(int64_t numbers, int64_t pieces, int threads) {
    return static_cast<int>(larger(1, smaller(threads, smaller(pieces, numbers / NUMBERS_PER_THREAD))));
}

// How a thread treats subnormal numbers (torch.set_flush_denormal): the caller's mode is that of all its threads.
#if defined(__x86_64__)
inline unsigned float_mode() { return _mm_getcsr(); }
inline void set_float_mode(unsigned mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
inline uint64_t float_mode() {
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}
inline void set_float_mode(uint64_t mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
#else
inline int float_mode() { return 0; }
inline void set_float_mode(int) {}
#endif

// Threads taken for a call, of those that calls from other threads of the process leave: a server's threads do not start
// a team each.
class Team {
public:
    explicit Team(int wanted) {
        int busy = __atomic_load_n(&adajudge::busy_threads, __ATOMIC_RELAXED);
        do {
            size_ = static_cast<int>(larger(1, wanted - busy));
        } while (!__atomic_compare_exchange_n(&adajudge::busy_threads, &busy, busy + size_, true, __ATOMIC_RELAXED,
                                              __ATOMIC_RELAXED));
    }
    ~Team() { __atomic_sub_fetch(&adajudge::busy_threads, size_, __ATOMIC_RELAXED); }
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;
    int size() const { return size_; }

private:
    int size_;
};

// body(piece, thread) for every piece, on at most `threads` threads. One thread is the caller itself: no pool is touched
// then, which is what a process forked from one with a pool needs.
template <class Body>
void parallel_for(int64_t pieces, int threads, Body body) {
    const Team team(threads);
    if (team.size() == 1) {
        for (int64_t piece = 0; piece < pieces; ++piece) body(piece, 0);
        return;
    }
    const auto mode = float_mode();
#pragma omp parallel num_threads(team.size())
    {
        const auto own = float_mode();
        set_float_mode(mode);
#pragma omp for schedule(dynamic)
        for (int64_t piece = 0; piece < pieces; ++piece) body(piece, omp_get_thread_num());
        set_float_mode(own);
    }
}

// Uninitialised memory from a cache line's boundary on. Made before threads start: they have nobody to throw to.
template <class A>
class Scratch {
public:
    explicit Scratch(int64_t count)
        : data_(static_cast<A*>(::operator new[](static_cast<std::size_t>(count) * sizeof(A), LINE))) {}
    ~Scratch() { ::operator delete[](data_, LINE); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    A* row(int64_t index, int64_t width) const { return data_ + index * width; }
    A* data() const { return data_; }

private:
    static constexpr std::align_val_t LINE{64};
    A* data_;
};

}  // namespace
