// Launches of the gated expert combination, forward: two, or three where the large weights have two dtypes.
#include "experts_plans.cuh"

namespace adajudge::cuda {

void form_shares(const Stream& stream, const char* operation, const Experts& call, real* shares) {
    const auto launch_for = [&](auto stored, const void* view_in, const void* router_in) {
        using T = decltype(stored);
        using A = arithmetic<T>;
        ShareArguments<T> arguments{};
        arguments.sizes = sizes_of(call);
        for (int v = 0; v < VIEWS; ++v) arguments.views[v] = static_cast<const A*>(call.views[v]);
        arguments.weights = {static_cast<const T*>(view_in), static_cast<const T*>(router_in)};
        arguments.shares = static_cast<A*>(shares);
        const SharePlan plan = share_plan<A>(call.features);
        with_width<T>(call.features, [&](auto width) {
            const int64_t tiles = unit_tiles(arguments.sizes, arguments.weights, SHARE_UNITS<width>);
            const dim3 grid(unsigned(tiles * parts(call.rows, SHARE_ROWS)), unsigned(plan.segments));
            launch(stream, operation, grid, plan.threads, sizeof(ShareParts<T, width>), form_shares<T, width>, arguments);
        });
    };
    with_large_weights(call.view_in.dtype, call.view_in.data, call.router_in.dtype, call.router_in.data, launch_for);
}

void experts(const Experts& call, const Stream& stream) {
    with_arithmetic(call.fp64 ? Dtype::float64 : Dtype::float32, [&](auto number) {
        using A = decltype(number);
        EvaluateArguments<A> arguments{};
        arguments.sizes = sizes_of(call);
        arguments.segments = share_plan<A>(call.features).segments;
        const Scratch<A> shares(stream, {call.rows * arguments.segments * arguments.sizes.columns()});
        form_shares(stream, "experts", call, shares[0]);
        arguments.shares = shares[0];
        arguments.weights = small_weights<A>(call);
        arguments.reward = static_cast<A*>(call.reward);
        arguments.scores = static_cast<A*>(call.scores);
        arguments.pi = static_cast<A*>(call.pi);
        launch(stream, "experts", dim3(unsigned(call.rows)), EVALUATE_THREADS, sizeof(OutputSums<A>), evaluate<A, false>,
               arguments);
    });
}

}  // namespace adajudge::cuda
