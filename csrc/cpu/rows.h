// What kernels do with rows of numbers: sums of them, whose order is fixed, and dot products.
#pragma once

#include "parallel.h"
#include "functions.h"

namespace {

template <class A>
void fill_zero(A* to, int64_t count) {
    std::memset(to, 0, static_cast<std::size_t>(count) * sizeof(A));
}

// to += from
template <class A, class T>
void add_row(A* to, const T* from, int64_t d) {
    for_lanes(0, d, [&](int64_t j, auto n) { store(to + j, load(to + j, n) + load(from + j, n), n); });
}

template <class A>
A dot(const A* a, const A* b, int64_t d) {
    auto total = broadcast<Lanes<A>>(A(0));
    for_segments(d, [&](int64_t begin, int64_t end) {
        auto part = broadcast<Lanes<A>>(A(0));
        for_lanes(begin, end, [&](int64_t j, auto n) { part = multiply_add(load(a + j, n), load(b + j, n), part); });
        total += part;
    });
    return sum<A>(total);
}

// A sum of many terms: eights of eights, so that its error grows with the logarithm of their number.
template <class A>
class LongSum {
public:
    LongSum() {
        for (auto& level : levels_) level = broadcast<Lanes<A>>(A(0));
    }
    ALWAYS_INLINE void add(Lanes<A> x) {
        levels_[0] += x;
        ++count_;
        for (int level = 0; level + 1 < LEVELS && count_ % (int64_t(8) << 3 * level) == 0; ++level) {
            levels_[level + 1] += levels_[level];
            levels_[level] = broadcast<Lanes<A>>(A(0));
        }
    }
    ALWAYS_INLINE Lanes<A> total() const {
        Lanes<A> sum = levels_[0];
        for (int level = 1; level < LEVELS; ++level) sum += levels_[level];
        return sum;
    }

private:
    static constexpr int LEVELS = 5;
    Lanes<A> levels_[LEVELS];
    int64_t count_ = 0;
};

// out = the sum of `count` rows; of groups of them first, for accuracy.
template <class A>
void sum_rows(const A* rows, int64_t count, int64_t d, A* out, int threads) {
    constexpr int64_t BLOCK = 256;  // features, a multiple of LANES
    constexpr int64_t GROUP = 64;
    parallel_for(parts(d, BLOCK), threads_for(count * d, parts(d, BLOCK), threads), [&](int64_t block, int) {
        const int64_t begin = block * BLOCK, width = smaller(BLOCK, d - begin);
        A group[BLOCK], total[BLOCK] = {};
        for (int64_t first = 0; first < count; first += GROUP) {
            fill_zero(group, width);
            for (int64_t row = first; row < smaller(first + GROUP, count); ++row)
                add_row(group, rows + row * d + begin, width);
            add_row(total, group, width);
        }
        std::memcpy(out + begin, total, static_cast<std::size_t>(width) * sizeof(A));
    });
}

}  // namespace
