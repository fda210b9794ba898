// RMSNorm and SwiGLU, against loops over doubles. Every row counts, padding too.
#include "testing.h"

using namespace testing;

static double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

CASE(rms_norm) {
    const int64_t rows = setting.tokens.roles.size(), d = setting.features;
    const double eps = 1e-6;
    for (bool updated : {true, false}) {
        const Buffer x = Buffer::random(setting.dtype, rows * d), update = Buffer::random(setting.dtype, rows * d);
        const Buffer weight = Buffer::random(arithmetic_of(setting.dtype), d);
        const Buffer total(setting.dtype, rows * d), normed(setting.dtype, rows * d);
        on::rms_norm({setting.dtype, setting.threads, rows, d, eps, x, updated ? update.data() : nullptr, weight,
                            updated ? total.data() : nullptr, normed});
        Numbers sums = x.numbers(), expected(rows * d);
        for (int64_t i = 0; updated && i < rows * d; ++i) sums[i] += update[i];
        if (updated) expect_near("total", total, sums, 1, 1);
        for (int64_t row = 0; row < rows; ++row) {
            long double squares = 0;  // doubles are no measure of doubles: d additions
            // The norm is of what is stored, rounded.
            const auto u = [&](int64_t j) { return updated ? total[row * d + j] : sums[row * d + j]; };
            for (int64_t j = 0; j < d; ++j) squares += u(j) * u(j);
            for (int64_t j = 0; j < d; ++j) expected[row * d + j] = u(j) / std::sqrt(squares / d + eps) * weight[j];
        }
        expect_near("normed", normed, expected, 8);
    }
}

CASE(rms_norm_backward) {
    const int64_t rows = setting.tokens.roles.size(), d = setting.features;
    const double eps = 0.01;  // a single feature may be near zero
    for (bool residual : {true, false}) {
        const Buffer u = Buffer::random(setting.dtype, rows * d), weight = Buffer::random(arithmetic_of(setting.dtype), d);
        const Buffer grad_total = Buffer::random(setting.dtype, rows * d), grad_normed = Buffer::random(setting.dtype, rows * d);
        const Buffer grad(setting.dtype, rows * d), grad_weight(arithmetic_of(setting.dtype), d);
        on::rms_norm_backward({setting.dtype, setting.threads, rows, d, eps, residual ? grad_total.data() : nullptr,
                                     grad_normed, u, weight, grad, grad_weight});
        const Numbers x = u.numbers(), g = grad_normed.numbers(), w = weight.numbers();
        Numbers expected(rows * d), of_weight(d);
        for (int64_t row = 0; row < rows; ++row) {
            double squares = 0, products = 0;
            for (int64_t j = 0, i = row * d; j < d; ++j, ++i) {
                squares += x[i] * x[i];
                products += g[i] * w[j] * x[i];
            }
            const double norm = std::sqrt(squares / d + eps);
            for (int64_t j = 0, i = row * d; j < d; ++j, ++i) {
                expected[i] = (g[i] * w[j] - x[i] * products / (norm * norm * d)) / norm + (residual ? grad_total[i] : 0);
                of_weight[j] += g[i] * x[i] / norm;
            }
        }
        expect_near("grad", grad, expected, 16, 32);  // 1 / norm is up to ten
        expect_near("grad_weight", grad_weight, of_weight, 16, 64);
    }
}

CASE(swiglu) {
    const int64_t rows = setting.tokens.roles.size(), f = setting.features;
    const Buffer gate_up = Buffer::random(setting.dtype, rows * 2 * f), out(setting.dtype, rows * f);
    on::swiglu({setting.dtype, setting.threads, rows, f, gate_up, out});
    Numbers expected(rows * f);
    for (int64_t i = 0; i < rows * f; ++i) {
        const int64_t at = i / f * 2 * f + i % f;
        expected[i] = gate_up[at] * sigmoid(gate_up[at]) * gate_up[at + f];
    }
    expect_near("out", out, expected, 8);
}

CASE(swiglu_backward) {
    const int64_t rows = setting.tokens.roles.size(), f = setting.features;
    const Buffer gate_up = Buffer::random(setting.dtype, rows * 2 * f), grad = Buffer::random(setting.dtype, rows * f);
    const Buffer grad_gate_up(setting.dtype, rows * 2 * f);
    on::swiglu_backward({setting.dtype, setting.threads, rows, f, grad, gate_up, grad_gate_up});
    Numbers expected(rows * 2 * f);
    for (int64_t i = 0; i < rows * f; ++i) {
        const int64_t at = i / f * 2 * f + i % f;
        const double gate = gate_up[at], up = gate_up[at + f], s = sigmoid(gate);
        expected[at] = grad[i] * up * s * (1 + gate * (1 - s));
        expected[at + f] = grad[i] * gate * s;
    }
    expect_near("grad_gate_up", grad_gate_up, expected, 8);
}
