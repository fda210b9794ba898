// Gated expert combination, forward: pre-activations by tiles of units, then row by row all the rest.
#include "experts.h"

namespace adajudge::ADAJUDGE_LEVEL {
namespace {

template <class A>
void run_experts(const Experts& call) {
    const int64_t columns = 3 * call.view_units + 4 * call.router_units, units = hidden_units(call);
    const Scratch<A> shares(call.rows * columns);
    form_shares(call, shares.data());
    const int threads = threads_for(call.rows * columns, call.rows, call.threads);
    const Scratch<A> layers(threads * 2 * units);
    parallel_for(call.rows, threads, [&](int64_t b, int thread) {
        A* pre = layers.row(2 * thread, units);
        const Row<A> row = evaluate(call, shares.row(b, columns), pre, pre + units);
        A reward = 0;
        for (int v = 0; v < 3; ++v) reward += row.pi[v] * row.scores[v];
        static_cast<A*>(call.reward)[b] = reward;
        std::memcpy(static_cast<A*>(call.scores) + 3 * b, row.scores, sizeof row.scores);
        std::memcpy(static_cast<A*>(call.pi) + 3 * b, row.pi, sizeof row.pi);
    });
}

}  // namespace

void experts(const Experts& call) { call.fp64 ? run_experts<double>(call) : run_experts<float>(call); }

}  // namespace adajudge::ADAJUDGE_LEVEL
