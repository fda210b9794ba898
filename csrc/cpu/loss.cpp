// The focal Bradley-Terry loss: blocks of pairs and of sequences, each summed on its own, then block after block.
#include "dtypes.h"
#include "functions.h"
#include "parallel.h"

namespace adajudge::ADAJUDGE_LEVEL {
namespace {

constexpr int64_t BLOCK = 1024;  // pairs, or sequences

template <class A>
struct Pairs {
    const Loss& call;
    const A *chosen, *rejected, *weight, *view_weights;
    A *grad_chosen, *grad_weight, *grad_view_weights;

    // The sum over a block of -w (1-p)^gamma log p. d/dz [-(1-p)^gamma log p] = (1-p)^gamma (gamma p log p - (1-p)).
    double pairs(int64_t begin, int64_t end) const {
        const auto all = [](double x) { return broadcast<Lanes<A>>(A(x)); };
        const auto zero = all(0), one = all(1), gamma = all(call.gamma);
        const auto temperature = all(call.temperature), count = all(call.pairs);
        double total = 0;
        for_lanes(begin, end, [&](int64_t i, auto n) {
            const Lanes<A> z = (load(chosen + i, n) - load(rejected + i, n)) / temperature, minus_z = zero - z;
            const Lanes<A> w = weight ? load(weight + i, n) : one;
            // p = sigmoid(z), q = 1 - p; both and their logarithms from exp(-|z|), which does not overflow.
            const Lanes<A> small = exp_of_negative(where_negative(z, z, minus_z)), rest = logarithm_beyond_one(small);
            const Lanes<A> larger_one = one / (one + small), smaller_one = small * larger_one;
            const Lanes<A> p = where_negative(z, smaller_one, larger_one), q = where_negative(z, larger_one, smaller_one);
            const Lanes<A> log_p = where_negative(z, z, zero) - rest, log_q = where_negative(z, zero, minus_z) - rest;
            const Lanes<A> modulation = exp_of_negative(gamma * log_q), value = zero - modulation * log_p;
            A held[LANES];
            store(held, value * w, All{});
            for (int64_t r = 0; r < smaller(end - i, LANES); ++r) total += held[r];
            const Lanes<A> d_z = modulation * (gamma * p * log_p - q);
            if (grad_chosen) store(grad_chosen + i, d_z * w / count / temperature, n);
            if (grad_weight) store(grad_weight + i, value / count, n);
        });
        return total;
    }

    // The sum over a block of max(0, eta - H(pi))^2; log pi stays finite where a softmax underflowed to 0.
    double sequences(int64_t begin, int64_t end) const {
        const A tiny = sizeof(A) == sizeof(float) ? A(0x1p-126) : A(0x1p-1022), scale = A(2 * call.entropy_weight);
        A log_weights[3 * BLOCK];
        for_lanes(0, 3 * (end - begin), [&](int64_t i, auto n) {
            store(log_weights + i, logarithm(maximum(broadcast<Lanes<A>>(tiny), load(view_weights + 3 * begin + i, n))), n);
        });
        double total = 0;
        for (int64_t i = begin; i < end; ++i) {
            const A *pi = view_weights + 3 * i, *log_pi = log_weights + 3 * (i - begin);
            A shortfall = A(call.entropy_floor) + (pi[0] * log_pi[0] + pi[1] * log_pi[1] + pi[2] * log_pi[2]);
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
