// Numbers as states store them, sixteen bytes at a time, and the arithmetic they take part in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace adajudge::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

// What numbers stored as T are computed in.
template <class T>
using arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline double widened(double x) { return x; }
__device__ inline float widened(float x) { return x; }
__device__ inline float widened(bf16 x) { return __bfloat162float(x); }
__device__ inline float widened(fp16 x) { return __half2float(x); }

// a b + c in one rounding, said so where it is meant: then every compiler makes the same of it.
__device__ inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// Rounded to nearest even.
template <class T>
__device__ T narrowed(arithmetic<T> x) {
    if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16_rn(x);
    else if constexpr (std::is_same_v<T, fp16>) return __float2half_rn(x);
    else return x;
}

// How many numbers of type T a thread loads at once: sixteen bytes of them, or one where rows do not consist of such.
template <class T>
constexpr int FULL_WIDTH = 16 / int(sizeof(T));

// W neighbouring numbers as they are stored: sixteen bytes, or a number alone. Loads that should be under way together are made
// first, all of them, and widened afterwards.
template <class T, int W>
struct Stored {
    using Bits = std::conditional_t<W == 1, T, uint4>;
    static_assert(W == 1 || W == FULL_WIDTH<T>);
    Bits bits;

    // Zeros where they are not wanted: a load with a predicate, no branch.
    __device__ static Stored load(const T* from, bool wanted) {
        Stored stored;
        memset(&stored, 0, sizeof stored);
        if (wanted) stored.bits = *reinterpret_cast<const Bits*>(from);
        return stored;
    }

    __device__ void widen(arithmetic<T>* to) const {
        if constexpr (std::is_same_v<T, bf16> && W > 1) {  // the upper half of a float: an instruction each
            uint32_t pairs[W / 2];
            memcpy(pairs, &bits, sizeof bits);
#pragma unroll
            for (int n = 0; n < W; n += 2) {
                to[n] = __uint_as_float(pairs[n / 2] << 16);
                to[n + 1] = __uint_as_float(pairs[n / 2] & 0xffff0000);
            }
        } else {
            T numbers[W];
            memcpy(numbers, &bits, sizeof bits);
#pragma unroll
            for (int n = 0; n < W; ++n) to[n] = widened(numbers[n]);
        }
    }

    // No instruction: what was widened before is not taken for what is widened after, and so not kept in registers meanwhile.
    // Numbers that are loaded one by one have room.
    __device__ void forget_widened() {
        if constexpr (W > 1) asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w));
    }
};

// `count` numbers as arithmetic.
template <int count, class T>
__device__ void load(const T* from, arithmetic<T>* to) {
    constexpr int W = count % FULL_WIDTH<T> ? 1 : FULL_WIDTH<T>;
#pragma unroll
    for (int i = 0; i < count; i += W) Stored<T, W>::load(from + i, true).widen(to + i);
}

template <int count, class T>
__device__ void store(T* to, const arithmetic<T>* from) {
    if constexpr (count == 1) {
        *to = narrowed<T>(from[0]);
    } else {
        constexpr int STEP = FULL_WIDTH<T>;
        static_assert(count % STEP == 0);
#pragma unroll
        for (int i = 0; i < count; i += STEP) {
            T numbers[STEP];
#pragma unroll
            for (int n = 0; n < STEP; ++n) numbers[n] = narrowed<T>(from[i + n]);
            uint4 bits;
            memcpy(&bits, numbers, sizeof bits);
            *reinterpret_cast<uint4*>(to + i) = bits;
        }
    }
}

// The C columns of a row that a thread of the block has: W neighbours, then W others a block's width further on, so
// that neighbouring threads read neighbouring bytes. blockIdx.y counts blocks that share a row.
template <int W, int C>
struct Columns {
    static constexpr int VECTORS = C / W;
    int first, step, end;  // of the row: its number of features

    __device__ explicit Columns(int features)
        : first(int(blockIdx.y * blockDim.x * C + threadIdx.x * W)), step(int(blockDim.x) * W), end(features) {}

    __device__ int at(int vector) const { return first + vector * step; }
    __device__ bool inside(int vector) const { return at(vector) < end; }

    // Those of a row as they are stored; zeros beyond its end, and everywhere if they are not wanted.
    template <class T>
    __device__ void load_stored(const T* row, bool wanted, Stored<T, W> (&to)[VECTORS]) const {
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) to[v] = Stored<T, W>::load(row + at(v), wanted && inside(v));
    }

    // As arithmetic; zeros beyond the row's end.
    template <class T>
    __device__ void load(const T* row, arithmetic<T> (&to)[C]) const {
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            if (inside(v)) {
                cuda::load<W>(row + at(v), to + v * W);
            } else {
#pragma unroll
                for (int n = 0; n < W; ++n) to[v * W + n] = 0;
            }
        }
    }

    template <class T>
    __device__ void store(T* row, const arithmetic<T> (&from)[C]) const {
#pragma unroll
        for (int v = 0; v < VECTORS; ++v)
            if (inside(v)) cuda::store<W>(row + at(v), from + v * W);
    }
};

}  // namespace adajudge::cuda
