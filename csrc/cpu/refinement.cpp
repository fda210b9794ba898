// The refinement block's rows: residual addition with RMSNorm, and SwiGLU on the merged projection; forward, backward.
#include "dtypes.h"
#include "rows.h"

#include <cmath>

namespace adajudge::ADAJUDGE_LEVEL {
namespace {

constexpr int64_t CHUNK = 64;  // rows whose share of a weight's gradient is summed first
constexpr int64_t PIECE = 16;  // rows that a thread takes at once where rows do not depend on each other

// 1 / sqrt(mean(u^2) + eps)
template <class A>
A inverse_norm(A squares, int64_t d, double eps) {
    return A(1) / std::sqrt(squares / A(d) + A(eps));
}

template <class T>
void run_rms_norm(const RmsNorm& call) {
    using A = arithmetic<T>;
    const int64_t d = call.features, pieces = parts(call.rows, PIECE);
    const A* weight = static_cast<const A*>(call.weight);
    parallel_for(pieces, threads_for(2 * call.rows * d, pieces, call.threads), [&](int64_t piece, int) {
        for (int64_t row = piece * PIECE; row < smaller((piece + 1) * PIECE, call.rows); ++row) {
            const T* x = static_cast<const T*>(call.x) + row * d;
            T* normed = static_cast<T*>(call.normed) + row * d;
            auto squares = broadcast<Lanes<A>>(A(0));
            if (call.update) {
                const T* update = static_cast<const T*>(call.update) + row * d;
                T* total = static_cast<T*>(call.total) + row * d;
                for_lanes(0, d, [&](int64_t j, auto n) { store(total + j, load(x + j, n) + load(update + j, n), n); });
                x = total;  // as stored: the norm is of what the residual stream holds
            }
            for_segments(d, [&](int64_t begin, int64_t end) {
                auto part = broadcast<Lanes<A>>(A(0));
                for_lanes(begin, end, [&](int64_t j, auto n) {
                    const Lanes<A> u = load(x + j, n);
                    part = multiply_add(u, u, part);
                });
                squares += part;
            });
            const auto inverse = broadcast<Lanes<A>>(inverse_norm(sum<A>(squares), d, call.eps));
            for_lanes(0, d, [&](int64_t j, auto n) {
                store(normed + j, load(x + j, n) * inverse * load(weight + j, n), n);
            });
        }
    });
}

// With n = u / rms(u) and h = weight g: du = (h - n mean(h n)) / rms(u) + g_u, dweight = sum over rows of g n.
template <class T>
void run_rms_norm_backward(const RmsNormBackward& call) {
    using A = arithmetic<T>;
    const int64_t d = call.features, chunks = parts(call.rows, CHUNK);
    const A* weight = static_cast<const A*>(call.weight);
    const Scratch<A> weight_parts(chunks * d);
    parallel_for(chunks, threads_for(3 * call.rows * d, chunks, call.threads), [&](int64_t chunk, int) {
        A* grad_weight = weight_parts.row(chunk, d);
        fill_zero(grad_weight, d);
        for (int64_t row = chunk * CHUNK; row < smaller((chunk + 1) * CHUNK, call.rows); ++row) {
            const T *u = static_cast<const T*>(call.total) + row * d, *g = static_cast<const T*>(call.grad_normed) + row * d;
            T* out = static_cast<T*>(call.grad) + row * d;
            auto squares = broadcast<Lanes<A>>(A(0)), products = squares;
            for_segments(d, [&](int64_t begin, int64_t end) {
                auto squares_part = broadcast<Lanes<A>>(A(0)), products_part = squares_part;
                for_lanes(begin, end, [&](int64_t j, auto n) {
                    const Lanes<A> x = load(u + j, n);
                    squares_part = multiply_add(x, x, squares_part);
                    products_part = multiply_add(load(g + j, n) * load(weight + j, n), x, products_part);
                });
                squares += squares_part;
                products += products_part;
            });
            const A inverse = inverse_norm(sum<A>(squares), d, call.eps);
            const auto inverses = broadcast<Lanes<A>>(inverse);
            const auto mean = broadcast<Lanes<A>>(sum<A>(products) * inverse / A(d));
            const T* grad_total = call.grad_total ? static_cast<const T*>(call.grad_total) + row * d : nullptr;
            for_lanes(0, d, [&](int64_t j, auto n) {
                const Lanes<A> normed = load(u + j, n) * inverses, grad = load(g + j, n);
                Lanes<A> du = (grad * load(weight + j, n) - normed * mean) * inverses;
                if (grad_total) du += load(grad_total + j, n);
                store(out + j, du, n);
                store(grad_weight + j, multiply_add(grad, normed, load(grad_weight + j, n)), n);
            });
        }
    });
    sum_rows(weight_parts.data(), chunks, d, static_cast<A*>(call.grad_weight), call.threads);
}

template <class T>
void run_swiglu(const Swiglu& call) {
    const int64_t f = call.features, pieces = parts(call.rows, PIECE);
    parallel_for(pieces, threads_for(3 * call.rows * f, pieces, call.threads), [&](int64_t piece, int) {
        for (int64_t row = piece * PIECE; row < smaller((piece + 1) * PIECE, call.rows); ++row) {
            const T *gate = static_cast<const T*>(call.gate_up) + row * 2 * f, *up = gate + f;
            T* out = static_cast<T*>(call.out) + row * f;
            for_lanes(0, f, [&](int64_t j, auto n) {
                const auto x = load(gate + j, n);
                store(out + j, x * sigmoid(x) * load(up + j, n), n);
            });
        }
    });
}

// dgate = g up s (1 + gate (1 - s)) with s = sigmoid(gate), dup = g gate s.
template <class T>
void run_swiglu_backward(const SwigluBackward& call) {
    using A = arithmetic<T>;
    const int64_t f = call.features, pieces = parts(call.rows, PIECE);
    const auto one = broadcast<Lanes<A>>(A(1));
    parallel_for(pieces, threads_for(5 * call.rows * f, pieces, call.threads), [&](int64_t piece, int) {
        for (int64_t row = piece * PIECE; row < smaller((piece + 1) * PIECE, call.rows); ++row) {
            const T *gate = static_cast<const T*>(call.gate_up) + row * 2 * f, *up = gate + f;
            const T* grad = static_cast<const T*>(call.grad) + row * f;
            T *grad_gate = static_cast<T*>(call.grad_gate_up) + row * 2 * f, *grad_up = grad_gate + f;
            for_lanes(0, f, [&](int64_t j, auto n) {
                const Lanes<A> x = load(gate + j, n), g = load(grad + j, n), s = sigmoid(x);
                store(grad_gate + j, g * load(up + j, n) * (s * (one + x * (one - s))), n);
                store(grad_up + j, g * (x * s), n);
            });
        }
    });
}

}  // namespace

void rms_norm(const RmsNorm& call) {
    with_dtype(call.dtype, [&](auto stored) { run_rms_norm<typename decltype(stored)::type>(call); });
}

void rms_norm_backward(const RmsNormBackward& call) {
    with_dtype(call.dtype, [&](auto stored) { run_rms_norm_backward<typename decltype(stored)::type>(call); });
}

void swiglu(const Swiglu& call) {
    with_dtype(call.dtype, [&](auto stored) { run_swiglu<typename decltype(stored)::type>(call); });
}

void swiglu_backward(const SwigluBackward& call) {
    with_dtype(call.dtype, [&](auto stored) { run_swiglu_backward<typename decltype(stored)::type>(call); });
}

}  // namespace adajudge::ADAJUDGE_LEVEL
