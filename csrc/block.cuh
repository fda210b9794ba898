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

// Sums of `count` numbers (a power of two) over the block's threads, for all of them: one barrier a call. Calls take the
// two buffers in turn, so that nobody writes what another still reads.
template <class A, int count, int MOST_WARPS = 32>
struct BlockSums {
    static_assert(count > 0 && count <= WARP && (count & (count - 1)) == 0);
    A parts[2][MOST_WARPS][count];

    __device__ void sum(A (&x)[count], int turn) {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
        // While there are several numbers, lanes swap halves of them: half the lanes go on with half the numbers.
        int distance = WARP / 2, number = 0;
#pragma unroll
        for (int half = count / 2; half; half /= 2, distance /= 2) {
            const bool upper = lane & distance;
            number = 2 * number + upper;
#pragma unroll
            for (int i = 0; i < half; ++i) {
                const A kept = upper ? x[i + half] : x[i], given = upper ? x[i] : x[i + half];
                x[i] = kept + __shfl_xor_sync(ALL_LANES, given, distance);
            }
        }
#pragma unroll
        for (; distance; distance /= 2) x[0] += __shfl_xor_sync(ALL_LANES, x[0], distance);
        auto& buffer = parts[turn % 2];
        if (lane % (WARP / count) == 0) buffer[warp][number] = x[0];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < count; ++i) x[i] = buffer[0][i];
        for (int other = 1; other < warps; ++other)
#pragma unroll
            for (int i = 0; i < count; ++i) x[i] += buffer[other][i];
    }
};

}  // namespace adajudge::cuda
