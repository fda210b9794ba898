// Sixteen lanes of fp32 (or fp64) arithmetic, on whatever vector registers the compiler is told to use.
//
// Each kernel source is compiled once per instruction set (levels.cpp), into a namespace of its own. All sets do the same
// operations on the same sixteen lanes in the same order, and fuse a multiplication with an addition only where
// `multiply_add` says so. So all sets that can fuse give the same bits; only the plain set of x86-64 cannot.
//
// Everything here is of internal linkage: a function that two sets shared could be the one of the larger set, and stop
// a machine that lacks it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace {

constexpr int LANES = 16;
constexpr int CACHE_LINE = 64;  // bytes

#if defined(__AVX512F__)
constexpr int REGISTER_BYTES = 64;
#elif defined(__AVX2__)
constexpr int REGISTER_BYTES = 32;
#else
constexpr int REGISTER_BYTES = 16;  // SSE2, NEON
#endif

// How states are stored. fp32 and fp64 are float and double.
struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

template <class T>
struct Arithmetic {
    using type = float;
};
template <>
struct Arithmetic<double> {
    using type = double;
};
template <class T>
using arithmetic = typename Arithmetic<T>::type;  // what numbers stored as T are computed in

// A pack of N lanes is one register, or two packs of half the lanes (recursion, not a loop over an array: compilers
// keep the members of a struct in registers).
template <class A, int N, bool ONE_REGISTER = (N * sizeof(A) == REGISTER_BYTES)>
struct Pack {
    using Half = Pack<A, N / 2>;
    Half low, high;
    static constexpr int lanes = N;
};
template <class A, int N>
struct Pack<A, N, true> {
    typedef A Register __attribute__((vector_size(REGISTER_BYTES)));
    Register v;
    static constexpr int lanes = N;
};
template <class A>
using Lanes = Pack<A, LANES>;

template <class To, class From>
ALWAYS_INLINE To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "the bits of one are the bits of the other");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

#define ELEMENTWISE(sign)                                                                        \
    template <class A, int N>                                                                    \
    ALWAYS_INLINE Pack<A, N, false> operator sign(Pack<A, N, false> a, Pack<A, N, false> b) {     \
        return {a.low sign b.low, a.high sign b.high};                                           \
    }                                                                                            \
    template <class A, int N>                                                                    \
    ALWAYS_INLINE Pack<A, N, true> operator sign(Pack<A, N, true> a, Pack<A, N, true> b) {        \
        return {a.v sign b.v};                                                                   \
    }
ELEMENTWISE(+)
ELEMENTWISE(-)
ELEMENTWISE(*)
ELEMENTWISE(/)
#undef ELEMENTWISE

template <class A, int N, bool ONE>
ALWAYS_INLINE Pack<A, N, ONE>& operator+=(Pack<A, N, ONE>& a, Pack<A, N, ONE> b) {
    return a = a + b;
}

// a b + c, in one rounding where there is an instruction for it: everywhere but in the plain set of x86-64.
template <class A, int N>
ALWAYS_INLINE Pack<A, N, false> multiply_add(Pack<A, N, false> a, Pack<A, N, false> b, Pack<A, N, false> c) {
    return {multiply_add(a.low, b.low, c.low), multiply_add(a.high, b.high, c.high)};
}

template <class A, int N>
ALWAYS_INLINE Pack<A, N, true> multiply_add(Pack<A, N, true> a, Pack<A, N, true> b, Pack<A, N, true> c) {
    using V [[maybe_unused]] = decltype(a.v);
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) return {(V)_mm512_fmadd_ps((__m512)a.v, (__m512)b.v, (__m512)c.v)};
    else return {(V)_mm512_fmadd_pd((__m512d)a.v, (__m512d)b.v, (__m512d)c.v)};
#elif defined(__FMA__)
    if constexpr (sizeof(A) == 4) return {(V)_mm256_fmadd_ps((__m256)a.v, (__m256)b.v, (__m256)c.v)};
    else return {(V)_mm256_fmadd_pd((__m256d)a.v, (__m256d)b.v, (__m256d)c.v)};
#elif defined(__aarch64__)
    if constexpr (sizeof(A) == 4) return {(V)vfmaq_f32((float32x4_t)c.v, (float32x4_t)a.v, (float32x4_t)b.v)};
    else return {(V)vfmaq_f64((float64x2_t)c.v, (float64x2_t)a.v, (float64x2_t)b.v)};
#else
    return a * b + c;
#endif
}

// The products of twice as many lanes are added to the sums one half after the other.
template <class A, int N, bool ONE>
ALWAYS_INLINE Pack<A, N, ONE> multiply_add(Pack<A, 2 * N, false> a, Pack<A, 2 * N, false> b, Pack<A, N, ONE> sums) {
    return multiply_add(a.high, b.high, multiply_add(a.low, b.low, sums));
}

// All lanes x.
template <class P, class A>
ALWAYS_INLINE P broadcast(A x) {
    if constexpr (P::lanes * sizeof(A) == REGISTER_BYTES) {
        return {x - typename P::Register{}};  // less zero: -0 stays -0, and compilers know that it is x
    } else {
        const auto half = broadcast<typename P::Half>(x);
        return {half, half};
    }
}

// -- Loads and stores ------------------------------------------------------------------------------------------

// Vectors of U as wide as `lanes` numbers.
template <class U, int lanes>
struct Vector {
    typedef U type __attribute__((vector_size(lanes * sizeof(U))));
};
template <class U, int lanes>
using vector_of = typename Vector<U, lanes>::type;

template <class V>
ALWAYS_INLINE V read(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class V>
ALWAYS_INLINE V select(V mask, V a, V b) {  // masks are all ones or all zeros, as comparisons give them
    return (mask & a) | (~mask & b);
}

// One register of fp32 from stored numbers, and back, rounded to nearest even.
template <int N>
ALWAYS_INLINE vector_of<float, N> widen(const bf16* from) {
#if defined(__AVX512F__)
    if constexpr (N == 16) {  // gcc puts it together from halves and quarters
        const __m512i bits = _mm512_maskz_cvtepu16_epi32(0xffff, read<__m256i>(from));
        return bit_cast<vector_of<float, N>>(_mm512_maskz_slli_epi32(0xffff, bits, 16));
    }
#endif
    const auto bits = __builtin_convertvector(read<vector_of<uint16_t, N>>(from), vector_of<uint32_t, N>);
    return bit_cast<vector_of<float, N>>(bits << 16);
}

// Rounded: the upper half of each number is its bf16.
template <int N>
ALWAYS_INLINE vector_of<int32_t, N> rounded_to_bf16(vector_of<float, N> x) {
    using U = vector_of<uint32_t, N>;
    const U bits = bit_cast<U>(x);
    const U rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return bit_cast<vector_of<int32_t, N>>(x == x ? rounded : bits | 0x400000u);  // NaN stays NaN
}

template <int N>
ALWAYS_INLINE void narrow(bf16* to, vector_of<float, N> x) {
#if defined(__AVX512F__)
    if constexpr (N == 16) {
        const __m256i out = _mm512_maskz_cvtepi32_epi16(0xffff, bit_cast<__m512i>(rounded_to_bf16<N>(x) >> 16));
        std::memcpy(to, &out, sizeof out);
        return;
    }
#endif
    const auto out = __builtin_convertvector(rounded_to_bf16<N>(x) >> 16, vector_of<int16_t, N>);
    std::memcpy(to, &out, sizeof out);
}

template <int N>
ALWAYS_INLINE vector_of<float, N> widen(const fp16* from) {
    using V = vector_of<float, N>;
#if defined(__AVX512F__)
    if constexpr (N == 16) return bit_cast<V>(_mm512_maskz_cvtph_ps(0xffff, read<__m256i>(from)));
#endif
#if defined(__F16C__)
    if constexpr (N == 8) return bit_cast<V>(_mm256_cvtph_ps(read<__m128i>(from)));
#endif
    using U = vector_of<uint32_t, N>;
    const U half = __builtin_convertvector(read<vector_of<uint16_t, N>>(from), U);
    const U size = half & 0x7fffu;
    const U normal = (size << 13) + (112u << 23);
    const U special = normal + (112u << 23);  // infinity and NaN
    const V subnormal = __builtin_convertvector(bit_cast<vector_of<int32_t, N>>(size), V) * 0x1p-24f;
    const U chosen = select<U>((U)(size < 0x400u), bit_cast<U>(subnormal), select<U>((U)(size >= 0x7c00u), special, normal));
    return bit_cast<V>(chosen | ((half & 0x8000u) << 16));
}

template <int N>
ALWAYS_INLINE void narrow(fp16* to, vector_of<float, N> x) {
#if defined(__AVX512F__)
    if constexpr (N == 16) {
        const __m256i out = _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        std::memcpy(to, &out, sizeof out);
        return;
    }
#endif
#if defined(__F16C__)
    if constexpr (N == 8) {
        const __m128i out = _mm256_cvtps_ph(bit_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        std::memcpy(to, &out, sizeof out);
        return;
    }
#endif
    using U = vector_of<uint32_t, N>;
    const U bits = bit_cast<U>(x), size = bits & 0x7fffffffu;
    const U normal = (size + 0xfffu + ((size >> 13) & 1u) - (112u << 23)) >> 13;
    // Adding 0.5 lets the addition round: what is left below it is the number in steps of 2^-24.
    const U subnormal = bit_cast<U>(bit_cast<vector_of<float, N>>(size) + 0.5f) - 0x3f000000u;
    const U special = select<U>((U)(size > 0x7f800000u), U{} + 0x7e00u, U{} + 0x7c00u);
    U kept = select<U>((U)(size < (113u << 23)), subnormal, normal);
    kept = select<U>((U)(size >= (143u << 23)), special, kept);
    const auto out = __builtin_convertvector(kept | ((bits >> 16) & 0x8000u), vector_of<uint16_t, N>);
    std::memcpy(to, &out, sizeof out);
}

// Consecutive numbers stored as T, as arithmetic lanes.
template <class P, class T>
ALWAYS_INLINE P load_pack(const T* from) {
    if constexpr (P::lanes * sizeof(arithmetic<T>) != REGISTER_BYTES) {
        return {load_pack<typename P::Half>(from), load_pack<typename P::Half>(from + P::lanes / 2)};
    } else if constexpr (sizeof(T) == sizeof(arithmetic<T>)) {
        return {read<typename P::Register>(from)};
    } else {
        return {widen<P::lanes>(from)};
    }
}

template <class T, class P>
ALWAYS_INLINE void store_pack(T* to, P x) {
    if constexpr (P::lanes * sizeof(arithmetic<T>) != REGISTER_BYTES) {
        store_pack(to, x.low);
        store_pack(to + P::lanes / 2, x.high);
    } else if constexpr (sizeof(T) == sizeof(arithmetic<T>)) {
        std::memcpy(to, &x.v, sizeof x.v);
    } else {
        narrow<P::lanes>(to, x.v);
    }
}

#if defined(__x86_64__)
// Two registers of 32-bit integers become one of 16-bit integers: compilers make much more of it.
ALWAYS_INLINE void store_pack(bf16* to, Pack<float, REGISTER_BYTES / 2, false> x) {
    constexpr int N = REGISTER_BYTES / 4;
    const auto low = rounded_to_bf16<N>(x.low.v), high = rounded_to_bf16<N>(x.high.v);
#if defined(__AVX512F__)
    alignas(64) static constexpr uint16_t UPPER[] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                     33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const __m512i out = _mm512_permutex2var_epi16(bit_cast<__m512i>(low), read<__m512i>(UPPER), bit_cast<__m512i>(high));
#elif defined(__AVX2__)
    const __m256i halves = _mm256_packs_epi32(bit_cast<__m256i>(low >> 16), bit_cast<__m256i>(high >> 16));
    const __m256i out = _mm256_permute4x64_epi64(halves, 0xd8);  // packed within 128 bits: put the quarters in order
#else
    const __m128i out = _mm_packs_epi32(bit_cast<__m128i>(low >> 16), bit_cast<__m128i>(high >> 16));
#endif
    std::memcpy(to, &out, sizeof out);
}
#endif

// How many of the sixteen lanes a step of a row has: all of them, twice as many, or the rest of a row.
struct All {};
struct Twice {};
struct Rest {
    int count;
};

template <class T>
ALWAYS_INLINE Lanes<arithmetic<T>> load(const T* from, All) {
    return load_pack<Lanes<arithmetic<T>>>(from);
}

template <class T>
ALWAYS_INLINE Pack<arithmetic<T>, 2 * LANES> load(const T* from, Twice) {
    return load_pack<Pack<arithmetic<T>, 2 * LANES>>(from);
}

template <class T>
ALWAYS_INLINE Lanes<arithmetic<T>> load(const T* from, Rest rest) {  // zeros after the row's end
    T held[LANES] = {};
    std::memcpy(held, from, rest.count * sizeof(T));
    return load_pack<Lanes<arithmetic<T>>>(held);
}

template <class T, class P, class Whole>
ALWAYS_INLINE void store(T* to, P x, Whole) {
    static_assert(!std::is_same_v<Whole, Rest>, "the rest of a row is of sixteen lanes at most");
    store_pack(to, x);
}

template <class T>
ALWAYS_INLINE void store(T* to, Lanes<arithmetic<T>> x, Rest rest) {
    T held[LANES];
    store_pack(held, x);
    std::memcpy(to, held, rest.count * sizeof(T));
}

// A store that goes past the caches, for what nobody reads soon: memory need not be read before it is written. `to` is at a
// multiple of what is stored: in rows of whole cache lines, of which the first is `streamable`. After the last one `streamed`.
template <class T, class P, class Whole>
ALWAYS_INLINE void stream(T* to, P x, Whole) {
    static_assert(!std::is_same_v<Whole, Rest>, "the rest of a row is of sixteen lanes at most");
#if defined(__x86_64__)
    alignas(64) T held[P::lanes];
    store_pack(held, x);
    constexpr int BYTES = P::lanes * sizeof(T);
    constexpr int STEP = BYTES < REGISTER_BYTES ? BYTES : REGISTER_BYTES;
    char *place = reinterpret_cast<char*>(to), *from = reinterpret_cast<char*>(held);
    for (int i = 0; i < BYTES; i += STEP) {
#if defined(__AVX512F__)
        if constexpr (STEP == 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(place + i), read<__m512i>(from + i));
#endif
#if defined(__AVX2__)
        if constexpr (STEP == 32) _mm256_stream_si256(reinterpret_cast<__m256i*>(place + i), read<__m256i>(from + i));
#endif
        if constexpr (STEP == 16) _mm_stream_si128(reinterpret_cast<__m128i*>(place + i), read<__m128i>(from + i));
    }
#else
    store_pack(to, x);
#endif
}

template <class T>
ALWAYS_INLINE void stream(T* to, Lanes<arithmetic<T>> x, Rest rest) {
    store(to, x, rest);
}

ALWAYS_INLINE bool streamable(const void* to) { return reinterpret_cast<uintptr_t>(to) % CACHE_LINE == 0; }

ALWAYS_INLINE void streamed() {
#if defined(__x86_64__)
    _mm_sfence();  // others see these stores no later than what comes after
#endif
}

// body(j, All or Rest) for every sixteen numbers of begin..end.
template <class Body>
ALWAYS_INLINE void for_lanes(int64_t begin, int64_t end, Body body) {
    int64_t j = begin;
    for (; j + LANES <= end; j += LANES) body(j, All{});
    if (j < end) body(j, Rest{static_cast<int>(end - j)});
}

// The same for numbers stored as T, and ahead(j) before every cache line of them or every sixteen, whatever is more: a place to
// ask for a line further on.
template <class T, class Ahead, class Body>
ALWAYS_INLINE void for_lines(int64_t begin, int64_t end, Ahead ahead, Body body) {
    constexpr int64_t LINE = LANES * sizeof(T) < CACHE_LINE ? CACHE_LINE / sizeof(T) : LANES;
    int64_t j = begin;
    for (; j + LINE <= end; j += LINE) {
        ahead(j);
        for (int64_t i = j; i < j + LINE; i += LANES) body(i, All{});
    }
    for_lanes(j, end, body);
}

// The same with a whole cache line of 16-bit numbers at once, Twice, where sixteen lanes are one register: two of them become one
// where they are stored. Sums have the same bits.
template <class T, class Ahead, class Body>
ALWAYS_INLINE void for_whole_lines(int64_t begin, int64_t end, Ahead ahead, Body body) {
    if constexpr (sizeof(T) == 2 && LANES * sizeof(arithmetic<T>) == REGISTER_BYTES) {
        int64_t j = begin;
        for (; j + 2 * LANES <= end; j += 2 * LANES) {
            ahead(j);
            body(j, Twice{});
        }
        for_lanes(j, end, body);
    } else {
        for_lines<T>(begin, end, ahead, body);
    }
}

constexpr int64_t ROW_SEGMENT = 2048;  // features

// body(begin, end) for pieces of a row: a sum of each piece first keeps long sums accurate. Shorter pieces cost several per
// cent: processors do not foresee where their loops end.
template <class Body>
ALWAYS_INLINE void for_segments(int64_t count, Body body) {
    for (int64_t begin = 0; begin < count; begin += ROW_SEGMENT)
        body(begin, begin + ROW_SEGMENT < count ? begin + ROW_SEGMENT : count);
}

}  // namespace
