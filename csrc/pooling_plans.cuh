// Which kernel of the pooling family serves a call: widths of loads, columns of a thread, threads of a block.
#pragma once

#include <algorithm>

#include "launch.cuh"
#include "pooling.cuh"

namespace adajudge::cuda {

// body(width), a constant: how many numbers of the arithmetic a load brings.
template <class A, class Body>
void with_vectors(int64_t d, Body body) {
    if (d % FULL_WIDTH<A> == 0) return body(std::integral_constant<int, FULL_WIDTH<A>>{});
    body(std::integral_constant<int, 1>{});
}

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

// `with_kernel` for a pass: those that read one state as it is have kernels of K = 1 only.
template <class T, Pass PASS, class Body>
void with_pass(int64_t d, int64_t depths, Body body) {
    if constexpr (PASS == Pass::views) with_kernel<T>(d, depths, body);
    else with_width<T>(d, [&](auto width) { body(width, std::integral_constant<int, 1>{}); });
}

// -- Rows by the copy engine ----------------------------------------------------------------------------------------

// Columns of a thread: registers hold little of what is under way, so there is room for the sums of twice as many, and two
// blocks of the usual widths share a multiprocessor: one starts and ends while the other reads. In the backward they serve
// rows that are too long otherwise.
template <class T>
constexpr int RING_COLUMNS = 2 * COLUMNS<T>;
constexpr int MOST_STAGES = 8;
template <int W, int K>
constexpr bool HAS_RING = W > 1 && K <= USUAL_DEPTHS;

// Whether the device at hand has a copy engine, and the kernels that use it were compiled for it: for its major capability.
inline bool uses_copy_engine(const char* operation) {
#if ADAJUDGE_HAS_COPY_ENGINE
    const int capability = device_attribute(cudaDevAttrComputeCapabilityMajor, operation);
    for (int compiled_for : {__CUDA_ARCH_LIST__})
        if (compiled_for / 100 == capability) return capability >= 9 && capability < 12;
#endif
    return false;
}

// Stages of a ring that follows `Shared`: as many as fit if the blocks that registers allow share a multiprocessor, or fewer
// blocks, as one stage alone brings nothing. 0: there is no copy engine, or not enough memory, or rows are too long.
template <class Shared>
int ring_stages(int64_t d, const RowPlan& plan, int most_threads, const char* operation) {
    if (plan.threads > most_threads || !uses_copy_engine(operation)) return 0;
    const int64_t of_block = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, operation);
    const int64_t of_device = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, operation);
    const int64_t reserved = device_attribute(cudaDevAttrReservedSharedMemoryPerBlock, operation);
    for (int blocks = most_threads / plan.threads; blocks; --blocks) {
        const int64_t room = std::min(of_block, of_device / blocks - reserved) - int64_t(sizeof(Shared));
        const int64_t stages = std::min<int64_t>(MOST_STAGES, room / Shared::Ring::bytes(1, d));
        if (stages > 1) return int(stages);
    }
    return 0;
}

template <class Shared, class Kernel, class Arguments>
void launch_ring(const Stream& stream, const char* operation, const RowPlan& plan, Kernel kernel, const Arguments& call) {
    const std::size_t bytes = sizeof(Shared) + Shared::Ring::bytes(call.stages, call.features);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared), operation);
    launch(stream, operation, dim3(unsigned(call.layout.num_chunks)), plan.threads, bytes, kernel, call);
}

template <class T>
void launch_dots(const Stream& stream, const char* operation, const DotsArguments<T>& call) {
    with_width<T>(call.features, [&](auto width) {
        launch(stream, operation, dim3(unsigned(call.layout.num_chunks)), DOTS_THREADS, 0, dots<T, width>, call);
    });
}

}  // namespace adajudge::cuda
