// What the threads of a warp and of a block compute together. Orders of summation are fixed.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

namespace adajudge::cuda {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffff;

// The block's dynamic shared memory.
__device__ inline void* shared_memory() {
    extern __shared__ uint4 shared_bytes[];
    return shared_bytes;
}

template <class A>
__device__ A warp_sum(A x) {
#pragma unroll
    for (int distance = WARP / 2; distance; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}

// NaN comes through.
template <class A>
__device__ A larger(A a, A b) {
    return a >= b || a != a ? a : b;
}

template <class A>
__device__ A warp_max(A x) {
#pragma unroll
    for (int distance = WARP / 2; distance; distance /= 2) x = larger(x, __shfl_xor_sync(ALL_LANES, x, distance));
    return x;
}

// Sums over the lanes that are NEAREST, 2 NEAREST, .. up to FARTHEST apart, of the first `count` (a power of two) of a
// lane's numbers. While there are several, lanes swap halves of them: half the lanes go on with half the numbers. A lane's
// sums are the first of `x` in the end; of which number the first of them is, is returned.
template <int NEAREST, int count, int FARTHEST = WARP / 2, class A>
__device__ int lane_sums(A* x) {
    static_assert(count > 0 && (count & (count - 1)) == 0);
    if constexpr (FARTHEST < NEAREST) {
        return 0;
    } else if constexpr (count == 1) {
        x[0] += __shfl_xor_sync(ALL_LANES, x[0], FARTHEST);
        return lane_sums<NEAREST, 1, FARTHEST / 2>(x);
    } else {
        constexpr int HALF = count / 2;
        const bool upper = threadIdx.x & FARTHEST;
#pragma unroll
        for (int i = 0; i < HALF; ++i) {
            const A kept = upper ? x[i + HALF] : x[i], given = upper ? x[i] : x[i + HALF];
            x[i] = kept + __shfl_xor_sync(ALL_LANES, given, FARTHEST);
        }
        return (upper ? HALF : 0) + lane_sums<NEAREST, HALF, FARTHEST / 2>(x);
    }
}

// Sums of `count` numbers (a power of two) over the block's threads, for all of them: one barrier a call. Calls take the
// two buffers in turn, so that nobody writes what another still reads.
template <class A, int count, int MOST_WARPS = 32>
struct BlockSums {
    static_assert(count <= WARP);
    static constexpr int LANES = WARP / count;  // that form one of the sums together
    A parts[2][MOST_WARPS][count];

    __device__ void sum(A (&x)[count], int turn) {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
        const int number = lane_sums<1, count>(x);  // lane / LANES
        auto& buffer = parts[turn % 2];
        if (lane % LANES == 0) buffer[warp][number] = x[0];
        __syncthreads();
        // Every warp adds all warps' parts, its lanes sharing the work: a thread alone would take many more instructions.
        A sum = 0;
#pragma unroll
        for (int first = 0; first < MOST_WARPS; first += LANES) {
            const int other = first + lane % LANES;
            if (other < warps) sum += buffer[other][number];
        }
#pragma unroll
        for (int distance = LANES / 2; distance; distance /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, distance);
#pragma unroll
        for (int i = 0; i < count; ++i) x[i] = __shfl_sync(ALL_LANES, sum, i * LANES);
    }
};

}  // namespace adajudge::cuda
