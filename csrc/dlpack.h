// How a tensor library shows its tensors to others: what of DLPack 1.3's C exchange interface (`__dlpack_c_exchange_api__`)
// is used here, in the standard's layout and with its codes. Minor versions later than this only add to it.
#pragma once

#include <cstdint>

namespace adajudge::dlpack {

constexpr uint32_t MAJOR_VERSION = 1;
constexpr const char* CAPSULE = "dlpack_exchange_api";

enum DeviceType : int32_t { CPU = 1, CUDA = 2 };
enum Code : uint8_t { INTEGER = 0, FLOAT = 2, BFLOAT = 4 };

// The library owns what the pointers point to, and keeps it while the tensor is kept.
struct Tensor {
    void* data;
    DeviceType device_type;
    int32_t device;
    int32_t dimensions;
    Code code;
    uint8_t bits;
    uint16_t lanes;
    const int64_t *shape, *strides;  // of `dimensions` numbers; strides count numbers, not bytes
    uint64_t offset;                 // of the first number, in bytes from `data`
};

struct Interface {
    uint32_t major, minor;
    const Interface* older;  // the same library's of an earlier major version, or null
    void (*others[3])();     // make a tensor, share one, take one over
    int (*view)(void* object, Tensor* view);  // of a Python object; not 0: it failed, and a Python error is set
};

}  // namespace adajudge::dlpack
