// The gated expert combination and the loss, against the same in doubles.
#include <algorithm>
#include <array>

#include "testing.h"

using namespace testing;

namespace {

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double silu(double x) { return x * sigmoid(x); }
double silu_derivative(double x) { return sigmoid(x) * (1 + x * (1 - sigmoid(x))); }

constexpr int VIEWS = 4;

// Of d numbers from a[i] and b[j] on. Doubles are among what is checked: one long sum would be off by as much as they
// may be.
double dot(const Buffer& a, int64_t i, const Buffer& b, int64_t j, int64_t d) {
    constexpr int64_t RUN = 64;
    double total = 0;
    for (int64_t begin = 0; begin < d; begin += RUN) {
        double sum = 0;
        for (int64_t n = begin; n < std::min(begin + RUN, d); ++n) sum += a[i + n] * b[j + n];
        total += sum;
    }
    return total;
}

// Arguments of a call: the large weights in the setting's dtype, all else in that of its arithmetic.
struct Arguments {
    Dtype stored, acc;
    int64_t rows, d, h, h_r;
    std::vector<Buffer> views;
    Buffer view_in, view_in_bias, view_out, view_out_bias, router_in, router_in_bias, router_out, router_out_bias;

    Arguments(const Setting& setting, int64_t rows, int64_t h, int64_t h_r)
        : stored(setting.dtype), acc(arithmetic_of(stored)), rows(rows), d(setting.features), h(h), h_r(h_r),
          view_in(Buffer::random(stored, 3 * h * d, 1 / std::sqrt(d))), view_in_bias(Buffer::random(acc, 3 * h)),
          view_out(Buffer::random(acc, 3 * h)), view_out_bias(Buffer::random(acc, 3)),
          router_in(Buffer::random(stored, h_r * 4 * d, 0.5 / std::sqrt(d))), router_in_bias(Buffer::random(acc, h_r)),
          router_out(Buffer::random(acc, 3 * h_r)), router_out_bias(Buffer::random(acc, 3)) {
        for (int v = 0; v < VIEWS; ++v) views.push_back(Buffer::random(acc, rows * d));
    }

    adajudge::Experts call(int threads, void* reward, void* scores, void* pi) const {
        return {acc == Dtype::float64, threads, rows, d, h, h_r, {views[0], views[1], views[2], views[3]},
                {stored, view_in}, {stored, router_in}, view_in_bias, view_out, view_out_bias, router_in_bias,
                router_out, router_out_bias, reward, scores, pi};
    }
};

// One row by its definition.
struct Row {
    std::array<Numbers, 3> pre;  // of the views' hidden layers
    Numbers router_pre;
    double scores[3], pi[3], reward = 0;

    Row(const Arguments& given, int64_t b) : router_pre(given.router_in_bias.numbers()) {
        const int64_t d = given.d, h = given.h, h_r = given.h_r;
        double logits[3], top = -INFINITY, total = 0;
        for (int v = 0; v < 3; ++v) {
            scores[v] = given.view_out_bias[v];
            pre[v].resize(h);
            for (int64_t u = 0; u < h; ++u) {
                pre[v][u] = given.view_in_bias[v * h + u] + dot(given.view_in, (v * h + u) * d, given.views[v], b * d, d);
                scores[v] += given.view_out[v * h + u] * silu(pre[v][u]);
            }
        }
        for (int64_t u = 0; u < h_r; ++u)
            for (int v = 0; v < VIEWS; ++v)
                router_pre[u] += dot(given.router_in, (u * VIEWS + v) * d, given.views[v], b * d, d);
        for (int v = 0; v < 3; ++v) {
            logits[v] = given.router_out_bias[v];
            for (int64_t u = 0; u < h_r; ++u) logits[v] += given.router_out[v * h_r + u] * silu(router_pre[u]);
            top = std::max(top, logits[v]);
        }
        for (int v = 0; v < 3; ++v) total += pi[v] = std::exp(logits[v] - top);
        for (int v = 0; v < 3; ++v) reward += scores[v] * (pi[v] /= total);
    }
};

struct Size {
    int64_t rows, h, h_r;
};

// Below and beyond a tile of units, few rows and several tiles of them; where rows are short, several steps of both.
std::vector<Size> sizes(int64_t features) {
    std::vector<Size> chosen{{0, 3, 2}, {1, 1, 1}, {5, 19, 33}, {9, 6, 3}};
    if (features <= 16) chosen.push_back({40, 260, 5});
    return chosen;
}

}  // namespace

CASE(experts) {
    for (const auto& [rows, h, h_r] : sizes(setting.features)) {
        const Arguments given(setting, rows, h, h_r);
        const Buffer reward(given.acc, rows), scores(given.acc, 3 * rows), pi(given.acc, 3 * rows);
        on::experts(given.call(setting.threads, reward, scores, pi));
        Numbers rewards, all_scores, all_pi;
        for (int64_t b = 0; b < rows; ++b) {
            const Row row(given, b);
            rewards.push_back(row.reward);
            all_scores.insert(all_scores.end(), row.scores, row.scores + 3);
            all_pi.insert(all_pi.end(), row.pi, row.pi + 3);
        }
        expect_near("reward", reward, rewards, 32, 32);  // sums of hundreds of terms, here and there
        expect_near("scores", scores, all_scores, 32, 32);
        expect_near("pi", pi, all_pi, 32, 32);
    }
}

CASE(experts_backward) {
    for (const auto& [rows, h, h_r] : sizes(setting.features)) {
        const Arguments given(setting, rows, h, h_r);
        const int64_t d = given.d;
        const Buffer grad_reward = Buffer::random(given.acc, rows), grad_scores = Buffer::random(given.acc, 3 * rows);
        const Buffer grad_pi = Buffer::random(given.acc, 3 * rows);
        std::vector<Buffer> grad_views;
        for (int v = 0; v < VIEWS; ++v) grad_views.emplace_back(given.acc, rows * d);
        const Buffer view_in(given.stored, 3 * h * d), router_in(given.stored, h_r * 4 * d), view_in_bias(given.acc, 3 * h),
            view_out(given.acc, 3 * h), view_out_bias(given.acc, 3), router_in_bias(given.acc, h_r),
            router_out(given.acc, 3 * h_r), router_out_bias(given.acc, 3);
        on::experts_backward({given.call(setting.threads, nullptr, nullptr, nullptr), grad_reward, grad_scores,
                                    grad_pi, {grad_views[0], grad_views[1], grad_views[2], grad_views[3]}, view_in,
                                    router_in, view_in_bias, view_out, view_out_bias, router_in_bias, router_out,
                                    router_out_bias});
        std::vector<Numbers> views(VIEWS, Numbers(rows * d));
        Numbers d_view_in(3 * h * d), d_router_in(h_r * 4 * d), d_view_in_bias(3 * h), d_view_out(3 * h),
            d_view_out_bias(3), d_router_in_bias(h_r), d_router_out(3 * h_r), d_router_out_bias(3);
        for (int64_t b = 0; b < rows; ++b) {
            const Row row(given, b);
            double d_scores[3], d_pi[3], d_logits[3], mean = 0;
            for (int v = 0; v < 3; ++v) {
                d_scores[v] = grad_reward[b] * row.pi[v] + grad_scores[3 * b + v];
                d_pi[v] = grad_reward[b] * row.scores[v] + grad_pi[3 * b + v];
                mean += row.pi[v] * d_pi[v];
            }
            for (int v = 0; v < 3; ++v) {
                d_logits[v] = row.pi[v] * (d_pi[v] - mean);
                d_view_out_bias[v] += d_scores[v];
                d_router_out_bias[v] += d_logits[v];
                for (int64_t u = 0; u < h; ++u) {
                    const double pre = row.pre[v][u], d_pre = d_scores[v] * given.view_out[v * h + u] * silu_derivative(pre);
                    d_view_out[v * h + u] += d_scores[v] * silu(pre);
                    d_view_in_bias[v * h + u] += d_pre;
                    for (int64_t j = 0; j < d; ++j) {
                        d_view_in[(v * h + u) * d + j] += d_pre * given.views[v][b * d + j];
                        views[v][b * d + j] += d_pre * given.view_in[(v * h + u) * d + j];
                    }
                }
            }
            for (int64_t u = 0; u < h_r; ++u) {
                double d_pre = 0;
                for (int v = 0; v < 3; ++v) {
                    d_pre += d_logits[v] * given.router_out[v * h_r + u];
                    d_router_out[v * h_r + u] += d_logits[v] * silu(row.router_pre[u]);
                }
                d_pre *= silu_derivative(row.router_pre[u]);
                d_router_in_bias[u] += d_pre;
                for (int v = 0; v < VIEWS; ++v)
                    for (int64_t j = 0; j < d; ++j) {
                        d_router_in[(u * VIEWS + v) * d + j] += d_pre * given.views[v][b * d + j];
                        views[v][b * d + j] += d_pre * given.router_in[(u * VIEWS + v) * d + j];
                    }
            }
        }
        const double scale = rows > 9 ? 256 : 32;  // sums over rows too
        for (int v = 0; v < VIEWS; ++v) expect_near("grad_views", grad_views[v], views[v], 32, scale);
        expect_near("view_in", view_in, d_view_in, 32, scale);
        expect_near("router_in", router_in, d_router_in, 32, scale);
        expect_near("view_in_bias", view_in_bias, d_view_in_bias, 32, scale);
        expect_near("view_out", view_out, d_view_out, 32, scale);
        expect_near("view_out_bias", view_out_bias, d_view_out_bias, 32, scale);
        expect_near("router_in_bias", router_in_bias, d_router_in_bias, 32, scale);
        expect_near("router_out", router_out, d_router_out, 32, scale);
        expect_near("router_out_bias", router_out_bias, d_router_out_bias, 32, scale);
    }
}

CASE(loss) {
    const Dtype acc = arithmetic_of(setting.dtype);
    const double gamma = 2, temperature = 0.7, floor = 0.9, weight = 0.3;
    for (int64_t pairs : {0, 1, 1500})
        for (bool optional : {false, true}) {
            const int64_t sequences = 2 * pairs + 3;
            const Buffer chosen = Buffer::random(acc, pairs, 3), rejected = Buffer::random(acc, pairs, 3);
            const Buffer pair_weight = Buffer::random(acc, optional ? pairs : 0), loss(acc, 1);
            Buffer pi(acc, optional ? 3 * sequences : 0);
            const Buffer d_chosen(acc, pairs), d_weight(acc, optional ? pairs : 0), d_pi(acc, pi.count);
            double focal = 0, squares = 0;
            Numbers of_chosen(pairs), of_weight(d_weight.count), of_pi(pi.count);
            for (int64_t i = 0; i < pairs; ++i) {
                const double z = (chosen[i] - rejected[i]) / temperature, p = sigmoid(z), q = sigmoid(-z);
                const double value = -std::pow(q, gamma) * std::log(p), w = optional ? pair_weight[i] : 1;
                focal += w * value / pairs;
                of_chosen[i] = w * std::pow(q, gamma) * (gamma * p * std::log(p) - q) / pairs / temperature;
                if (optional) of_weight[i] = value / pairs;
            }
            for (int64_t s = 0; optional && s < sequences; ++s) {
                double exponentials[3], total = 0, shortfall = floor;
                for (double& x : exponentials) total += x = std::exp(2 * normal());
                for (int v = 0; v < 3; ++v) pi.set(3 * s + v, exponentials[v] / total);
                for (int v = 0; v < 3; ++v) shortfall += pi[3 * s + v] * std::log(pi[3 * s + v]);
                shortfall = std::max(0.0, shortfall);
                squares += shortfall * shortfall / sequences;
                for (int v = 0; v < 3; ++v)
                    of_pi[3 * s + v] = 2 * weight * shortfall * (std::log(pi[3 * s + v]) + 1) / sequences;
            }
            on::loss({acc == Dtype::float64, setting.threads, pairs, optional ? sequences : 0, gamma, temperature,
                            floor, weight, chosen, rejected, optional ? pair_weight.data() : nullptr,
                            optional ? pi.data() : nullptr, loss, d_chosen, optional ? d_weight.data() : nullptr,
                            optional ? d_pi.data() : nullptr});
            expect_near("loss", loss, {focal + weight * squares}, 64, 4);
            expect_near("grad_chosen", d_chosen, of_chosen, 16, 1);
            expect_near("grad_pair_weight", d_weight, of_weight, 16, 1);
            expect_near("grad_view_weights", d_pi, of_pi, 16, 1);
        }
}
