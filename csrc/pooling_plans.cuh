// Which kernel of the pooling family serves a call: widths of loads, columns of a thread, threads of a block.
#pragma once

#include "launch.cuh"
#include "pooling.cuh"

namespace adajudge::cuda {

constexpr int USUAL_DEPTHS = 4;  // K up to this have kernels of their own

// How a row of d features is spread over threads.
struct RowPlan {
    int columns, threads;  // of a thread, of a block
    unsigned blocks;       // that share a row: with more than one, a kernel of its own computes the dot products first
};

inline RowPlan whole_row(int64_t d, int columns) {
    return {columns, int(parts(d, columns * WARP)) * WARP, 1};
}

inline RowPlan shared_row(int64_t d, int columns) {
    constexpr int THREADS = 256;
    return {columns, THREADS, unsigned(parts(d, columns * THREADS))};
}

// The kernels that hold a whole row in a block, as `with_kernel` chooses them.
template <class T>
int64_t most_threads(int64_t d, int64_t depths) {
    return fast_rows<T>(d) && depths <= USUAL_DEPTHS ? SCAN_THREADS<FULL_WIDTH<T>, 1> : SCAN_THREADS<1, MAX_DEPTHS>;
}

// Columns of a thread; in the forward, twice as many where a row is too long for them and registers allow it.
template <class T>
constexpr int COLUMNS = sizeof(T) < 8 ? 8 : 4;
constexpr bool allows_twice(bool fast, int64_t depths, std::size_t size) {
    return fast && depths <= USUAL_DEPTHS && depths * int64_t(size) <= 12;
}

template <class T>
RowPlan backward_plan(int64_t d, int64_t depths) {
    return d <= COLUMNS<T> * most_threads<T>(d, depths) ? whole_row(d, COLUMNS<T>) : shared_row(d, COLUMNS<T>);
}

template <class T>
RowPlan forward_plan(int64_t d, int64_t depths) {
    const RowPlan plan = backward_plan<T>(d, depths);
    const bool twice = plan.blocks > 1 && allows_twice(fast_rows<T>(d), depths, sizeof(T));
    return twice && d <= 2 * COLUMNS<T> * most_threads<T>(d, depths) ? whole_row(d, 2 * COLUMNS<T>) : plan;
}

// body(width, depths), constants: how many numbers a load brings, and K. Fast rows have a kernel for each usual K.
template <class T, class Body>
void with_kernel(int64_t d, int64_t depths, Body body) {
    using std::integral_constant;
    if constexpr (sizeof(T) < 8) {
        if (fast_rows<T>(d)) {
            constexpr integral_constant<int, FULL_WIDTH<T>> width;
            switch (depths) {
                case 1: return body(width, integral_constant<int, 1>{});
                case 2: return body(width, integral_constant<int, 2>{});
                case 3: return body(width, integral_constant<int, 3>{});
                case 4: return body(width, integral_constant<int, 4>{});
                default: return body(width, integral_constant<int, MAX_DEPTHS>{});
            }
        }
    }
    constexpr integral_constant<int, 1> one;
    if (depths == 1) return body(one, one);
    body(one, integral_constant<int, MAX_DEPTHS>{});
}

template <class T>
void launch_dots(const Stream& stream, const char* operation, const DotsArguments<T>& call) {
    with_width<T>(call.features, [&](auto width) {
        launch(stream, operation, dim3(unsigned(call.layout.num_chunks)), DOTS_THREADS, 0, dots<T, width>, call);
    });
}

}  // namespace adajudge::cuda
