// Stands in for the CUDA toolkit's header of this name.
#pragma once

#include <cmath>
#include <cstdint>

struct __half {
    uint16_t bits;
};

inline float __half2float(__half x) {
    const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                       : exponent == 0 ? std::ldexp(float(fraction), -24)
                                       : std::ldexp(float(1024 + fraction), exponent - 25);
    return x.bits >> 15 ? -size : size;
}

inline __half __float2half_rn(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return {0x7fff};
    const float size = std::fabs(x);
    if (size >= 65520) return {uint16_t(sign | 0x7c00)};
    int exponent;
    std::frexp(size, &exponent);                              // size < 2^exponent
    const int step = (exponent < -13 ? -13 : exponent) - 11;  // the last place counts 2^step
    const float rounded = std::nearbyint(std::ldexp(size, -step));
    const int units = int(rounded);  // up to 2048: then the next exponent
    if (exponent < -13 || size == 0) return {uint16_t(sign | units)};
    return {uint16_t(sign | (((exponent + 13) << 10) + units))};
}
