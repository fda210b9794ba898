// The launch of the focal Bradley-Terry loss.
#include "loss.cuh"

#include "launch.cuh"

namespace adajudge::cuda {

void loss(const Loss& call, const Stream& stream) {
    with_arithmetic(call.fp64 ? Dtype::float64 : Dtype::float32, [&](auto number) {
        using A = decltype(number);
        const LossArguments<A> arguments{call.pairs,
                                         call.sequences,
                                         A(call.gamma),
                                         A(call.temperature),
                                         A(call.entropy_floor),
                                         A(call.entropy_weight),
                                         static_cast<const A*>(call.chosen),
                                         static_cast<const A*>(call.rejected),
                                         static_cast<const A*>(call.pair_weight),
                                         static_cast<const A*>(call.view_weights),
                                         static_cast<A*>(call.loss),
                                         static_cast<A*>(call.grad_chosen),
                                         static_cast<A*>(call.grad_pair_weight),
                                         static_cast<A*>(call.grad_view_weights)};
        launch(stream, "loss", dim3(1), LOSS_THREADS, sizeof(LossSums), focal_bradley_terry<A>, arguments);
    });
}

}  // namespace adajudge::cuda
