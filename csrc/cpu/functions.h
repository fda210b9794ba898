// Functions of sixteen lanes: sums, exp, log and what is made of them. The same bits on all sets that can fuse: an exp or a log of
// a library's would differ from machine to machine.
#pragma once

#include "simd.h"

namespace {

// The larger of each two; b where one is NaN.
template <class A, int N>
ALWAYS_INLINE Pack<A, N, false> maximum(Pack<A, N, false> a, Pack<A, N, false> b) {
    return {maximum(a.low, b.low), maximum(a.high, b.high)};
}

template <class A, int N>
ALWAYS_INLINE Pack<A, N, true> maximum(Pack<A, N, true> a, Pack<A, N, true> b) {
    return {b.v <= a.v ? a.v : b.v};
}

// a where x is negative, else b.
template <class A, int N>
ALWAYS_INLINE Pack<A, N, false> where_negative(Pack<A, N, false> x, Pack<A, N, false> a, Pack<A, N, false> b) {
    return {where_negative(x.low, a.low, b.low), where_negative(x.high, a.high, b.high)};
}

template <class A, int N>
ALWAYS_INLINE Pack<A, N, true> where_negative(Pack<A, N, true> x, Pack<A, N, true> a, Pack<A, N, true> b) {
    return {x.v < 0 ? a.v : b.v};
}

// The sum over the lanes: halves first.
template <class A, int N>
ALWAYS_INLINE A sum_halves(vector_of<A, N> x) {
    if constexpr (N == 2) {
        return x[0] + x[1];
    } else {
        vector_of<A, N / 2> half[2];
        std::memcpy(half, &x, sizeof x);
        return sum_halves<A, N / 2>(half[0] + half[1]);
    }
}

template <class A, class P>
ALWAYS_INLINE A sum(P x) {
    if constexpr (P::lanes * sizeof(A) == REGISTER_BYTES) return sum_halves<A, P::lanes>(x.v);
    else return sum<A>(x.low + x.high);
}

// exp(x) for x <= 0, within 2 ulp in fp32; 0 where the result would be no normal number. NaN stays NaN.
template <int N>
ALWAYS_INLINE Pack<float, N, false> exp_of_negative(Pack<float, N, false> x) {
    return {exp_of_negative(x.low), exp_of_negative(x.high)};
}

template <int N>
ALWAYS_INLINE Pack<float, N, true> exp_of_negative(Pack<float, N, true> pack) {
    using V = vector_of<float, N>;
    using I = vector_of<int32_t, N>;
    const V x = pack.v;
    const V shifted = x * 1.44269504088896341f + 0x1.8p23f;  // the addition rounds to an integer, kept in the low bits
    const V n = shifted - 0x1.8p23f;
    const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts: n times the first is exact
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;             // minimax coefficients of Cephes' expf
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r + 1.0f;
    const I exponent = (bit_cast<I>(shifted) + 127) << 23;
    const V result = p * bit_cast<V>(exponent);
    return {bit_cast<V>(~(I)(x < -87.33654f) & bit_cast<I>(result))};
}

// log(x) of positive normal numbers, within 2 ulp in fp32. Infinity and NaN stay what they are.
template <int N>
ALWAYS_INLINE Pack<float, N, false> logarithm(Pack<float, N, false> x) {
    return {logarithm(x.low), logarithm(x.high)};
}

template <int N>
ALWAYS_INLINE Pack<float, N, true> logarithm(Pack<float, N, true> pack) {
    using V = vector_of<float, N>;
    using I = vector_of<int32_t, N>;
    const V x = pack.v;
    const I bits = bit_cast<I>(x);
    const I exponent = (bits - 0x3f3504f3) >> 23;  // x = 2^exponent m, m from sqrt(1/2) to sqrt(2)
    const V n = __builtin_convertvector(exponent, V);
    const V f = bit_cast<V>(bits - (exponent << 23)) - 1.0f, square = f * f;
    V p = f * 7.0376836292e-2f - 1.1514610310e-1f;  // minimax coefficients of Cephes' logf
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    const V rest = (p * f) * square + n * -2.12194440e-4f - square * 0.5f;  // ln 2 in two parts, as above
    return {x < __builtin_inff() ? f + rest + n * 0.693359375f : x};
}

// log(1 + x) for x from 0 to 1, accurate however small x is: with what the sum's rounding took.
template <int N>
ALWAYS_INLINE Pack<float, N, false> logarithm_beyond_one(Pack<float, N, false> x) {
    return {logarithm_beyond_one(x.low), logarithm_beyond_one(x.high)};
}

template <int N>
ALWAYS_INLINE Pack<float, N, true> logarithm_beyond_one(Pack<float, N, true> x) {
    const auto one = broadcast<Pack<float, N, true>>(1.0f), sum = one + x;
    return logarithm(sum) + (x - (sum - one)) / sum;
}

// fp64 is for checking: one by one.
template <class Function, int N, bool ONE>
ALWAYS_INLINE Pack<double, N, ONE> each(Pack<double, N, ONE> x, Function function) {
    double lane[N];
    std::memcpy(lane, &x, sizeof lane);
    for (double& value : lane) value = function(value);
    std::memcpy(&x, lane, sizeof lane);
    return x;
}

template <int N, bool ONE>
ALWAYS_INLINE Pack<double, N, ONE> exp_of_negative(Pack<double, N, ONE> x) {
    return each(x, [](double value) { return __builtin_exp(value); });
}

template <int N, bool ONE>
ALWAYS_INLINE Pack<double, N, ONE> logarithm(Pack<double, N, ONE> x) {
    return each(x, [](double value) { return __builtin_log(value); });
}

template <int N, bool ONE>
ALWAYS_INLINE Pack<double, N, ONE> logarithm_beyond_one(Pack<double, N, ONE> x) {
    return each(x, [](double value) { return __builtin_log1p(value); });
}

template <class A>
ALWAYS_INLINE A exp_of_negative(A x) {
    A lane[LANES];
    store_pack(lane, exp_of_negative(broadcast<Lanes<A>>(x)));
    return lane[0];
}

// 1 / (1 + exp(-x)); written with exp(-|x|), it never overflows.
template <class A, int N>
ALWAYS_INLINE Pack<A, N, false> sigmoid(Pack<A, N, false> x) {
    return {sigmoid(x.low), sigmoid(x.high)};
}

template <class A, int N>
ALWAYS_INLINE Pack<A, N, true> sigmoid(Pack<A, N, true> x) {
    using Integer = decltype(x.v < x.v);
    const Integer negative = x.v < 0;
    const Integer sign = bit_cast<Integer>(broadcast<Pack<A, N>>(A(-0.0)).v);
    const Pack<A, N, true> one = broadcast<Pack<A, N>>(A(1));
    const Pack<A, N, true> small = exp_of_negative(Pack<A, N, true>{bit_cast<decltype(x.v)>(bit_cast<Integer>(x.v) | sign)});
    const Integer top = select<Integer>(negative, bit_cast<Integer>(small.v), bit_cast<Integer>(one.v));
    return Pack<A, N, true>{bit_cast<decltype(x.v)>(top)} / (one + small);
}

}  // namespace
