// Stands in for the CUDA toolkit's header of this name: the kernels in csrc/, unchanged, become C++ that runs on the CPU.
//
// Every CUDA thread is a fiber with a stack of its own. A fiber runs until a barrier or a shuffle makes it wait; who goes
// on then is up to the schedule (emulation.h), which is meant to be the one that hurts. Shared memory is filled with NaN
// before each block and, under AddressSanitizer, guarded at its end.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __launch_bounds__(...)

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

// Of the thread that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
const char* cudaGetErrorString(cudaError_t error);

enum cudaDeviceAttr {
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor,
    cudaDevAttrReservedSharedMemoryPerBlock,
};
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
constexpr int cudaSharedmemCarveoutMaxShared = 100;

struct cudaLaunchAttribute {};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

namespace emulation {

using Function = void (*)();
cudaError_t set_attribute(Function kernel, cudaFuncAttribute attribute, int value);
cudaError_t run(Function kernel, const cudaLaunchConfig_t& config, const std::function<void()>& body);
void wait_for_block();
// The value that lane `from` of this warp gives; every lane of the warp calls it.
uint64_t exchange(uint64_t value, int from);
int lane();

template <class T>
T exchanged(T value, int from) {
    static_assert(sizeof(T) <= 8);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = exchange(bits, from);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace emulation

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
    const auto body = [=] { kernel(Parameters(arguments)...); };
    return emulation::run(reinterpret_cast<emulation::Function>(kernel), *config, body);
}

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
    return emulation::set_attribute(reinterpret_cast<emulation::Function>(kernel), attribute, value);
}

inline void __syncthreads() { emulation::wait_for_block(); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulation::exchanged(value, emulation::lane() ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T value, int from) {
    return emulation::exchanged(value, from);
}

inline float __uint_as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

using std::exp;
using std::fma;
using std::log;
using std::log1p;
