// Launches of the gated expert combination, backward: the hidden layers again, the gradients of the pre-activations, then
// those of the views, of the two large weights and of the small ones. Five; eight where the large weights have two dtypes.
#include "experts_backward.cuh"

#include "experts_plans.cuh"

namespace adajudge::cuda {
namespace {

template <class A>
void evaluate_backward(const Stream& stream, const ExpertsBackward& call, const A* shares, A* grad_outputs, A* hidden,
                       A* grad_hidden) {
    EvaluateArguments<A> arguments{};
    arguments.sizes = sizes_of(call.forward);
    arguments.segments = share_plan<A>(call.forward.features).segments;
    arguments.shares = shares;
    arguments.weights = small_weights<A>(call.forward);
    arguments.grad_reward = static_cast<const A*>(call.grad_reward);
    arguments.grad_scores = static_cast<const A*>(call.grad_scores);
    arguments.grad_pi = static_cast<const A*>(call.grad_pi);
    arguments.grad_outputs = grad_outputs;
    arguments.hidden = hidden;
    arguments.grad_hidden = grad_hidden;
    launch(stream, "experts_backward", dim3(unsigned(call.forward.rows)), EVALUATE_THREADS, sizeof(OutputSums<A>),
           evaluate<A, true>, arguments);
}

void launch_view_gradients(const Stream& stream, const ExpertsBackward& call, const real* grad_hidden) {
    const Experts& forward = call.forward;
    const auto launch_for = [&](auto stored, const void* view_in, const void* router_in) {
        using T = decltype(stored);
        using A = arithmetic<T>;
        ViewGradientArguments<T> arguments{};
        arguments.sizes = sizes_of(forward);
        arguments.grad_hidden = static_cast<const A*>(grad_hidden);
        arguments.weights = {static_cast<const T*>(view_in), static_cast<const T*>(router_in)};
        for (int v = 0; v < VIEWS; ++v) arguments.grad_views[v] = static_cast<A*>(call.grad_views[v]);
        const dim3 grid(unsigned(parts(forward.rows, VIEW_ROWS)), unsigned(parts(forward.features, VIEW_FEATURES)),
                        router_in ? VIEWS : 3);
        with_width<T>(forward.features, [&](auto width) {
            launch(stream, "experts_backward", grid, VIEW_THREADS, sizeof(ViewShared<A, width>), view_gradients<T, width>,
                   arguments);
        });
    };
    with_large_weights(forward.view_in.dtype, forward.view_in.data, forward.router_in.dtype, forward.router_in.data,
                       launch_for);
}

void launch_weight_gradients(const Stream& stream, const ExpertsBackward& call, const real* grad_hidden) {
    const Experts& forward = call.forward;
    const auto launch_for = [&](auto stored, const void* view_in, const void* router_in) {
        using T = decltype(stored);
        using A = arithmetic<T>;
        WeightGradientArguments<T> arguments{};
        arguments.sizes = sizes_of(forward);
        arguments.grad_hidden = static_cast<const A*>(grad_hidden);
        for (int v = 0; v < VIEWS; ++v) arguments.views[v] = static_cast<const A*>(forward.views[v]);
        arguments.grads = {static_cast<T*>(const_cast<void*>(view_in)), static_cast<T*>(const_cast<void*>(router_in))};
        const dim3 grid(unsigned(unit_tiles(arguments.sizes, arguments.grads, WEIGHT_UNITS)),
                        unsigned(parts(forward.features, WEIGHT_FEATURES)));
        launch(stream, "experts_backward", grid, WEIGHT_THREADS, sizeof(WeightTiles<A>), weight_gradients<T>, arguments);
    };
    with_large_weights(forward.view_in.dtype, call.grad_view_in, forward.router_in.dtype, call.grad_router_in, launch_for);
}

template <class A>
void launch_vector_gradients(const Stream& stream, const ExpertsBackward& call, const A* grad_outputs, const A* hidden,
                             const A* grad_hidden) {
    const VectorGradientArguments<A> arguments{sizes_of(call.forward),
                                               grad_outputs,
                                               hidden,
                                               grad_hidden,
                                               static_cast<A*>(call.grad_view_in_bias),
                                               static_cast<A*>(call.grad_view_out),
                                               static_cast<A*>(call.grad_view_out_bias),
                                               static_cast<A*>(call.grad_router_in_bias),
                                               static_cast<A*>(call.grad_router_out),
                                               static_cast<A*>(call.grad_router_out_bias)};
    const dim3 grid(unsigned(parts(arguments.sizes.hidden() + 6, WARP)));
    launch(stream, "experts_backward", grid, VECTOR_THREADS, sizeof(VectorParts<A>), vector_gradients<A>, arguments);
}

}  // namespace

void experts_backward(const ExpertsBackward& call, const Stream& stream) {
    with_arithmetic(call.forward.fp64 ? Dtype::float64 : Dtype::float32, [&](auto number) {
        using A = decltype(number);
        const ExpertSizes sizes = sizes_of(call.forward);
        const int64_t segments = share_plan<A>(sizes.features).segments, of_hidden = sizes.rows * sizes.hidden();
        const Scratch<A> scratch(stream, {sizes.rows * segments * sizes.columns(), sizes.rows * 6, of_hidden, of_hidden});
        A *shares = scratch[0], *grad_outputs = scratch[1], *hidden = scratch[2], *grad_hidden = scratch[3];
        form_shares(stream, "experts_backward", call.forward, shares);
        evaluate_backward<A>(stream, call, shares, grad_outputs, hidden, grad_hidden);
        launch_view_gradients(stream, call, grad_hidden);
        launch_weight_gradients(stream, call, grad_hidden);
        launch_vector_gradients<A>(stream, call, grad_outputs, hidden, grad_hidden);
    });
}

}  // namespace adajudge::cuda
