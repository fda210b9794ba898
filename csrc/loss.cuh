// The focal Bradley-Terry loss. One block for all pairs and sequences: rewards are few, and the sums have one order.
#pragma once

#include <type_traits>

#include "block.cuh"
#include "vectors.cuh"

namespace adajudge::cuda {

constexpr int LOSS_THREADS = 512;
using LossSums = BlockSums<double, 2, LOSS_THREADS / WARP>;  // of few numbers: fp64 costs nothing

template <class A>
struct LossArguments {
    int64_t pairs, sequences;
    A gamma, temperature, entropy_floor, entropy_weight;
    const A *chosen, *rejected, *pair_weight, *view_weights;  // [N], [N], [N] or null, [N', 3] or null
    A *loss;                                                  // [1]
    A *grad_chosen, *grad_pair_weight, *grad_view_weights;    // as the arguments, or null
};

// min(z, 0) - log(1 + exp(-|z|)), accurate however small the exponential is.
template <class A>
__device__ A log_sigmoid(A z) {
    return (z < 0 ? z : A(0)) - log1p(exp(z < 0 ? z : -z));
}

// L = mean[-w (1-p)^gamma log p] + lambda mean[max(0, eta - H(pi))^2], p = sigmoid((r+ - r-) / tau), and its gradients:
// d/dz [-(1-p)^gamma log p] = (1-p)^gamma (gamma p log p - (1-p)). One block.
template <class A>
__global__ void __launch_bounds__(LOSS_THREADS, 1) focal_bradley_terry(LossArguments<A> call) {
    // What stands for the log's argument where a softmax underflowed to 0: the smallest normal number.
    constexpr A TINY = std::is_same_v<A, float> ? A(0x1p-126) : A(0x1p-1022);
    const A pairs = A(call.pairs), sequences = A(call.sequences);
    double sums[2] = {0, 0};  // of the pairs' losses, of the squares of entropies' shortfalls
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < call.pairs; i += LOSS_THREADS) {
        const A z = (call.chosen[i] - call.rejected[i]) / call.temperature;
        const A w = call.pair_weight ? call.pair_weight[i] : A(1);
        const A log_p = log_sigmoid(z), log_q = log_sigmoid(-z), modulation = exp(call.gamma * log_q);
        const A value = -modulation * log_p;
        const A d_z = modulation * (call.gamma * exp(log_p) * log_p - exp(log_q));
        if (call.grad_chosen) call.grad_chosen[i] = d_z * w / pairs / call.temperature;
        if (call.grad_pair_weight) call.grad_pair_weight[i] = value / pairs;
        sums[0] += value * w;
    }
#pragma unroll 1
    for (int64_t i = threadIdx.x; call.view_weights && i < call.sequences; i += LOSS_THREADS) {
        A log_pi[3], shortfall = call.entropy_floor;
#pragma unroll
        for (int v = 0; v < 3; ++v) {
            const A pi = call.view_weights[3 * i + v];
            log_pi[v] = log(pi <= TINY ? TINY : pi);
            shortfall = multiply_add(pi, log_pi[v], shortfall);
        }
        if (shortfall <= 0) shortfall = 0;  // NaN stays NaN
        if (call.grad_view_weights)
#pragma unroll
            for (int v = 0; v < 3; ++v)
                call.grad_view_weights[3 * i + v] = 2 * call.entropy_weight * shortfall * (log_pi[v] + 1) / sequences;
        sums[1] += shortfall * shortfall;
    }
    static_cast<LossSums*>(shared_memory())->sum(sums, 0);
    if (threadIdx.x == 0) {
        const double focal = call.pairs ? sums[0] / pairs : 0, shortfall = call.sequences ? sums[1] / sequences : 0;
        *call.loss = A(focal + call.entropy_weight * shortfall);
    }
}

}  // namespace adajudge::cuda
