// Launches of the pooling backward.
#include "pooling_backward.cuh"

#include "launch.cuh"
#include "pooling_plans.cuh"

namespace adajudge::cuda {
namespace {

template <class T>
void launch_zero_padding(const Stream& stream, const char* operation, const Layout& layout, int64_t d, int64_t count,
                         const Tensors<T>& outputs) {
    const ZeroArguments<T> call{layout.roles, layout.num_tokens, int(d), int(count), outputs};
    const dim3 grid(unsigned(parts(layout.num_tokens, ZERO_THREADS / WARP)));
    with_width<T>(d, [&](auto width) { launch(stream, operation, grid, ZERO_THREADS, 0, zero_padding<T, width>, call); });
}

// Narrow blocks for kernels that read little: many blocks share a row.
template <class T, class Kernel, class Arguments>
void launch_spread(const Stream& stream, const char* operation, int width, Kernel kernel, const Arguments& call) {
    const dim3 grid(unsigned(call.layout.num_group_chunks), unsigned(parts(call.features, SPREAD_THREADS * width)));
    launch(stream, operation, grid, SPREAD_THREADS, 0, kernel, call);
}

// With four states, 16 columns of a thread do not fit its registers.
template <class T, int W, int C, int K>
constexpr bool HAS_BACKWARD_RING = HAS_RING<W, K> && (C == COLUMNS<T> || K < 4);

// Stages of the ring whose threads have C columns, 0 where there is none.
template <class T, Pass PASS, int C>
int scan_backward_stages(int64_t d, int64_t depths) {
    int stages = 0;
    with_pass<T, PASS>(d, depths, [&](auto width, auto depths) {
        constexpr int W = width, K = depths;
        if constexpr (HAS_BACKWARD_RING<T, W, C, K>) {
            constexpr int most_threads = BACKWARD_THREADS<W, C, K>;
            stages = ring_stages<ScanBackwardShared<T, W, C, K>>(d, whole_row(d, C), most_threads, "views_backward");
        }
    });
    return stages;
}

template <class T, int W, int C, int K, Pass PASS>
void launch_ring_backward(const Stream& stream, const RowPlan& plan, const ScanBackwardArguments<T>& call) {
    if constexpr (HAS_BACKWARD_RING<T, W, C, K>) {
        using Shared = ScanBackwardShared<T, W, C, K>;
        launch_ring<Shared>(stream, "views_backward", plan, ring_scan_backward<T, W, C, K, PASS>, call);
    }
}

template <class T, Pass PASS>
void launch_scan_backward(const Stream& stream, const RowPlan& plan, const ScanBackwardArguments<T>& call) {
    with_pass<T, PASS>(call.features, call.depths, [&](auto width, auto depths) {
        constexpr int W = width, K = depths, C = COLUMNS<T>;
        if (call.stages && plan.columns == C) return launch_ring_backward<T, W, C, K, PASS>(stream, plan, call);
        if (call.stages) return launch_ring_backward<T, W, RING_COLUMNS<T>, K, PASS>(stream, plan, call);
        launch(stream, "views_backward", dim3(unsigned(call.layout.num_chunks), plan.blocks), plan.threads,
               sizeof(ScanBackwardShared<T, W, C, K>), scan_backward<T, W, C, K, PASS>, call);
    });
}

template <Pass PASS>
void launch_views_backward(const ViewsBackward& call, const Stream& stream) {
    constexpr bool VIEWS = PASS == Pass::views;
    with_dtype(call.dtype, [&](auto stored) {
        using T = decltype(stored);
        using A = arithmetic<T>;
        const Layout& layout = call.layout;
        const int64_t chunks = layout.num_chunks, d = call.features, depths = call.depths;
        const bool shared = layout.num_groups != layout.num_sequences;
        RowPlan plan = backward_plan<T>(d, depths);
        int stages = scan_backward_stages<T, PASS, COLUMNS<T>>(d, depths);
        if (plan.blocks > 1) {
            stages = scan_backward_stages<T, PASS, RING_COLUMNS<T>>(d, depths);
            if (stages) plan = whole_row(d, RING_COLUMNS<T>);
        }
        const bool wide = plan.blocks > 1;
        const int64_t per_token = chunks * CHUNK_TOKENS;
        const Scratch<A> scratch(stream, {shared ? per_token : 0, shared ? per_token : 0, wide ? per_token : 0,
                                          wide ? per_token : 0, VIEWS ? chunks * plan.blocks * depths : 0, chunks * d});
        ScanBackwardArguments<T> scan{};
        scan.layout = layout;
        scan.features = int(d);
        scan.depths = int(depths);
        scan.stages = stages;
        scan.response_only = call.response_only;
        scan.shared = shared;
        scan.states = Tensors<const T>::from(call.states, depths);
        scan.grad_states = Tensors<T>::from(call.grad_states, depths);
        scan.alpha = static_cast<const A*>(call.alpha);
        scan.weight = static_cast<const A*>(call.weight);
        scan.bias = static_cast<const A*>(call.bias);
        scan.grad_last = static_cast<const A*>(call.grad_last);
        scan.grad_mean = static_cast<const A*>(call.grad_mean);
        scan.grad_attention = static_cast<const A*>(call.grad_attention);
        scan.pooled = static_cast<const A*>(call.attention);
        scan.log_sum_exp = static_cast<const A*>(call.log_sum_exp);
        scan.betas = scratch[0];
        scan.grad_logits = scratch[1];
        scan.grad_alpha_parts = scratch[4];
        scan.grad_weight_parts = scratch[5];
        if (wide) {
            scan.logits = scratch[2];
            scan.grad_dots = scratch[3];
            const DotsArguments<T> arguments{layout, int(d), int(depths), call.response_only, scan.states, scan.alpha,
                                             scan.weight, scan.grad_attention, scan.pooled, scratch[2], scratch[3]};
            launch_dots(stream, "views_backward", arguments);
        }
        launch_scan_backward<T, PASS>(stream, plan, scan);
        if (shared) {
            const SpreadAttentionArguments<T> arguments{layout, int(d), int(depths), call.response_only, scan.grad_states,
                                                        scan.alpha, scan.weight, scan.grad_attention, scan.betas, scan.grad_logits};
            with_pass<T, PASS>(d, depths, [&](auto width, auto depths) {
                launch_spread<T>(stream, "views_backward", width, spread_attention<T, width, depths>, arguments);
            });
        } else {
            launch_zero_padding(stream, "views_backward", layout, d, depths, scan.grad_states);
        }
        with_vectors<A>(d, [&](auto width) {
            using Sums = ManyRowSums<A, width>;
            launch(stream, "views_backward", dim3(unsigned(parts(d, Sums::COLUMNS))), Sums::THREADS, sizeof(Sums),
                   add_rows<A, width>, static_cast<const A*>(scan.grad_weight_parts), chunks, d, static_cast<A*>(call.grad_weight));
        });
        if constexpr (VIEWS) {
            const SumAlphaArguments<A> arguments{layout, int(depths), int(plan.blocks), scan.grad_alpha_parts,
                                                 static_cast<A*>(call.grad_alpha)};
            launch(stream, "views_backward", dim3(unsigned(layout.num_sequences)), WARP, 0, sum_alpha_parts<A>, arguments);
        }
    });
}

}  // namespace

void spread_means(const SpreadMeans& call, const Stream& stream) {
    with_dtype(call.dtype, [&](auto stored) {
        using T = decltype(stored);
        using A = arithmetic<T>;
        const SpreadMeansArguments<T> arguments{call.layout, int(call.features), static_cast<const A*>(call.prompt),
                                                static_cast<const A*>(call.response), static_cast<const A*>(call.all),
                                                static_cast<T*>(call.grad_hidden)};
        with_width<T>(call.features, [&](auto width) {
            launch_spread<T>(stream, "spread_means", width, spread_means<T, width>, arguments);
        });
        launch_zero_padding(stream, "spread_means", call.layout, call.features, 1, Tensors<T>{{arguments.grad_hidden}});
    });
}

void views_backward(const ViewsBackward& call, const Stream& stream) {
    if (call.alpha) launch_views_backward<Pass::views>(call, stream);
    else launch_views_backward<Pass::attention>(call, stream);
}

}  // namespace adajudge::cuda
