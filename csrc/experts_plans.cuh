// How a call of the experts becomes launches: what forward and backward share.
#pragma once

#include "experts.cuh"
#include "launch.cuh"

namespace adajudge::cuda {

inline ExpertSizes sizes_of(const Experts& call) {
    return {call.rows, call.features, call.view_units, call.router_units};
}

template <class A>
SmallWeights<A> small_weights(const Experts& call) {
    return {static_cast<const A*>(call.view_in_bias),   static_cast<const A*>(call.view_out),
            static_cast<const A*>(call.view_out_bias),  static_cast<const A*>(call.router_in_bias),
            static_cast<const A*>(call.router_out),     static_cast<const A*>(call.router_out_bias)};
}

// body(T{}, view_in, router_in) once if the two large weights have one dtype, else for each with the other one null.
template <class Body>
void with_large_weights(Dtype view_in_dtype, const void* view_in, Dtype router_in_dtype, const void* router_in, Body body) {
    const void* none = nullptr;
    if (view_in_dtype == router_in_dtype)
        return with_dtype(view_in_dtype, [&](auto stored) { body(stored, view_in, router_in); });
    with_dtype(view_in_dtype, [&](auto stored) { body(stored, view_in, none); });
    with_dtype(router_in_dtype, [&](auto stored) { body(stored, none, router_in); });
}

// How features are spread over blocks, evenly: nothing but their number decides, as a row's bits depend on it.
struct SharePlan {
    int segments, threads;
};

template <class A>
SharePlan share_plan(int64_t d) {
    const int64_t of_warp = WARP * SHARE_FEATURES<A>, segments = parts(d, SHARE_WARPS * of_warp);
    return {int(segments), int(parts(d, segments * of_warp)) * WARP};
}

// The shares of the pre-activations, [B, segments, 3 h + 4 h_r] of the arithmetic's numbers.
void form_shares(const Stream& stream, const char* operation, const Experts& call, real* shares);

}  // namespace adajudge::cuda
