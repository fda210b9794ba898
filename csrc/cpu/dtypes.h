// From a Dtype to the type that stores it.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

template <class T>
struct Stored {
    using type = T;
};

// body(Stored<T>{}) for the T that `dtype` names.
template <class Body>
void with_dtype(adajudge::Dtype dtype, Body body) {
    switch (dtype) {
        case adajudge::Dtype::float64: return body(Stored<double>{});
        case adajudge::Dtype::float32: return body(Stored<float>{});
        case adajudge::Dtype::bfloat16: return body(Stored<bf16>{});
        case adajudge::Dtype::float16: return body(Stored<fp16>{});
    }
}

}  // namespace
