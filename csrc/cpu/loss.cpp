// The focal Bradley-Terry loss: blocks of pairs and of sequences, each summed on its own, then block after block.
#include "dtypes.h"
#include "parallel.h"

namespace adajudge::ADAJUDGE_LEVEL {
namespace {

constexpr int64_t BLOCK = 1024;  // pairs, or sequences

template <class A>
A exponential(A x) {
    if constexpr (sizeof(A) == sizeof(float)) return __builtin_expf(x);
    else return __builtin_exp(x);
}

template <class A>
A logarithm(A x) {
    if constexpr (sizeof(A) == sizeof(float)) return __builtin_logf(x);
    else return __builtin_log(x);
}

// log(1 + x), accurate however small x is.
template <class A>
A logarithm_beyond_one(A x) {
    if constexpr (sizeof(A) == sizeof(float)) return __builtin_log1pf(x);
    else return __builtin_log1p(x);
}

template <class A>
struct Pairs {
    const Loss& call;
    const A *chosen, *rejected, *weight, *view_weights;
    A *grad_chosen, *grad_weight, *grad_view_weights;

    // The sum over a block of -w (1-p)^gamma log p. d/dz [-(1-p)^gamma log p] = (1-p)^gamma (gamma p log p - (1-p)).
    double pairs(int64_t begin, int64_t end) const {
        const A gamma = A(call.gamma), temperature = A(call.temperature), count = A(call.pairs);
        double total = 0;
        for (int64_t i = begin; i < end; ++i) {
            const A z = (chosen[i] - rejected[i]) / temperature, w = weight ? weight[i] : A(1);
            // p = sigmoid(z), q = 1 - p; both and their logarithms from exp(-|z|), which does not overflow.
            const A small = exponential(z < 0 ? z : -z), rest = logarithm_beyond_one(small);
            const A larger_one = 1 / (1 + small), smaller_one = small * larger_one;
            const A p = z < 0 ? smaller_one : larger_one, q = z < 0 ? larger_one : smaller_one;
            const A log_p = (z < 0 ? z : A(0)) - rest, log_q = (z < 0 ? A(0) : -z) - rest;
            const A modulation = exponential(gamma * log_q), value = -modulation * log_p;
            total += value * w;
            const A d_z = modulation * (gamma * p * log_p - q);
            if (grad_chosen) grad_chosen[i] = d_z * w / count / temperature;
            if (grad_weight) grad_weight[i] = value / count;
        }
        return total;
    }

    // The sum over a block of max(0, eta - H(pi))^2; log pi stays finite where a softmax underflowed to 0.
    double sequences(int64_t begin, int64_t end) const {
        const A tiny = sizeof(A) == sizeof(float) ? A(0x1p-126) : A(0x1p-1022), scale = A(2 * call.entropy_weight);
        double total = 0;
        for (int64_t i = begin; i < end; ++i) {
            const A* pi = view_weights + 3 * i;
            A log_pi[3], minus_entropy = 0;
            for (int v = 0; v < 3; ++v) {
                log_pi[v] = logarithm(pi[v] <= tiny ? tiny : pi[v]);
                minus_entropy += pi[v] * log_pi[v];
            }
            A shortfall = A(call.entropy_floor) + minus_entropy;
            if (shortfall <= 0) shortfall = 0;  // NaN stays NaN
            total += shortfall * shortfall;
            for (int v = 0; grad_view_weights && v < 3; ++v)
                grad_view_weights[3 * i + v] = scale * shortfall * (log_pi[v] + 1) / A(call.sequences);
        }
        return total;
    }
};

template <class A>
void run_loss(const Loss& call) {
    const Pairs<A> all{call,
                       static_cast<const A*>(call.chosen),
                       static_cast<const A*>(call.rejected),
                       static_cast<const A*>(call.pair_weight),
                       static_cast<const A*>(call.view_weights),
                       static_cast<A*>(call.grad_chosen),
                       static_cast<A*>(call.grad_pair_weight),
                       static_cast<A*>(call.grad_view_weights)};
    const int64_t of_pairs = parts(call.pairs, BLOCK), of_sequences = call.view_weights ? parts(call.sequences, BLOCK) : 0;
    const Scratch<double> sums(of_pairs + of_sequences);  // of few numbers: fp64 costs nothing
    const int threads = threads_for(call.pairs + call.sequences, of_pairs + of_sequences, call.threads);
    parallel_for(of_pairs + of_sequences, threads, [&](int64_t block, int) {
        const int64_t begin = (block < of_pairs ? block : block - of_pairs) * BLOCK;
        *sums.row(block, 1) = block < of_pairs ? all.pairs(begin, smaller(begin + BLOCK, call.pairs))
                                               : all.sequences(begin, smaller(begin + BLOCK, call.sequences));
    });
    double focal = 0, shortfall = 0;
    for (int64_t block = 0; block < of_pairs; ++block) focal += *sums.row(block, 1);
    for (int64_t block = of_pairs; block < of_pairs + of_sequences; ++block) shortfall += *sums.row(block, 1);
    const double pairs = static_cast<double>(larger(call.pairs, 1));
    const double sequences = static_cast<double>(larger(call.sequences, 1));
    static_cast<A*>(call.loss)[0] = static_cast<A>(focal / pairs + call.entropy_weight * (shortfall / sequences));
}

}  // namespace

void loss(const Loss& call) { call.fp64 ? run_loss<double>(call) : run_loss<float>(call); }

}  // namespace adajudge::ADAJUDGE_LEVEL
