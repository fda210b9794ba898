// Launches: the caller's stream, scratch memory, errors as exceptions with the operation's name.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "vectors.cuh"

namespace adajudge::cuda {

inline void check(cudaError_t error, const char* operation) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(operation) + ": the CUDA kernel could not be launched: " +
                                 cudaGetErrorString(error));
}

// Of the current device.
inline int device_attribute(cudaDeviceAttr attribute, const char* operation) {
    int device = 0, value = 0;
    check(cudaGetDevice(&device), operation);
    check(cudaDeviceGetAttribute(&value, attribute, device), operation);
    return value;
}

constexpr std::size_t USUAL_SHARED_BYTES = 48 << 10;  // more is given to those that ask first

template <class... Parameters, class... Arguments>
void launch(const Stream& stream, const char* operation, dim3 grid, int threads, std::size_t shared_bytes,
            void (*kernel)(Parameters...), Arguments... arguments) {
    if (!grid.x || !grid.y) return;  // nothing to do, which CUDA takes for an error
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream.handle);
    if (shared_bytes > USUAL_SHARED_BYTES)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), operation);
    check(cudaLaunchKernelEx(&config, kernel, arguments...), operation);
}

// Arrays in device memory that nobody needs after the call, from one piece of memory.
template <class A>
class Scratch {
public:
    Scratch(const Stream& stream, std::initializer_list<int64_t> counts) {
        int64_t total = 0;
        for (int64_t count : counts) {
            starts_.push_back(total);
            total += (count * int64_t(sizeof(A)) + 15) / 16 * 16;
        }
        memory_ = total ? static_cast<char*>(stream.memory(total)) : nullptr;
    }
    A* operator[](int index) const { return reinterpret_cast<A*>(memory_ + starts_[index]); }

private:
    std::vector<int64_t> starts_;
    char* memory_;
};

inline int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// body(T{}) for the T that stores a dtype's numbers.
template <class Body>
void with_dtype(Dtype dtype, Body body) {
    switch (dtype) {
        case Dtype::float64: return body(double{});
        case Dtype::float32: return body(float{});
        case Dtype::bfloat16: return body(bf16{});
        case Dtype::float16: return body(fp16{});
    }
}

// body(double{}) or body(float{}).
template <class Body>
void with_arithmetic(Dtype dtype, Body body) {
    if (dtype == Dtype::float64) body(double{});
    else body(float{});
}

// Whether rows are read sixteen bytes at a time. It depends on nothing but the size of a row: orders of summation depend on
// it, and must not depend on where a tensor lies. fp64 is for checking only, and has no fast kernels.
template <class T>
bool fast_rows(int64_t d) {
    return sizeof(T) < 8 && d % FULL_WIDTH<T> == 0;
}

// body(width), a constant: how many numbers a load brings.
template <class T, class Body>
void with_width(int64_t d, Body body) {
    if constexpr (sizeof(T) < 8) {
        if (fast_rows<T>(d)) return body(std::integral_constant<int, FULL_WIDTH<T>>{});
    }
    body(std::integral_constant<int, 1>{});
}

}  // namespace adajudge::cuda
