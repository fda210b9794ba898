// Launches of the pooling forward.
#include "pooling.cuh"

#include "launch.cuh"
#include "pooling_plans.cuh"

namespace adajudge::cuda {
namespace {

template <class A>
void launch_combine(const Stream& stream, const char* operation, const CombineArguments<A>& call) {
    with_vectors<A>(call.features, [&](auto width) {
        using Sums = ChunkSums<A, width>;
        const dim3 grid(unsigned(call.layout.num_sequences), unsigned(parts(call.features, Sums::COLUMNS)));
        launch(stream, operation, grid, Sums::THREADS, sizeof(Sums), combine<A, width>, call);
    });
}

// Stages of the ring, 0 where there is none.
template <class T, Pass PASS>
int scan_stages(int64_t d, int64_t depths, const char* operation) {
    int stages = 0;
    with_pass<T, PASS>(d, depths, [&](auto width, auto depths) {
        constexpr int W = width, K = depths, C = RING_COLUMNS<T>;
        if constexpr (HAS_RING<W, K>)
            stages = ring_stages<ScanShared<T, W, C, K, true>>(d, whole_row(d, C), SCAN_THREADS<W, K>, operation);
    });
    return stages;
}

template <class T, Pass PASS>
void launch_scan(const Stream& stream, const char* operation, const ScanArguments<T>& call) {
    const RowPlan plan = forward_plan<T>(call.features, call.depths);
    const auto scan_with = [&](auto width, auto depths, auto columns) {
        constexpr int W = width, K = depths, C = columns;
        launch(stream, operation, dim3(unsigned(call.layout.num_chunks), plan.blocks), plan.threads,
               sizeof(ScanShared<T, W, C, K, false>), scan<T, W, C, K, PASS>, call);
    };
    with_pass<T, PASS>(call.features, call.depths, [&](auto width, auto depths) {
        constexpr int W = width, K = depths, C = RING_COLUMNS<T>;
        if constexpr (HAS_RING<W, K>)
            if (call.stages)
                return launch_ring<ScanShared<T, W, C, K, true>>(stream, operation, whole_row(call.features, C),
                                                                 ring_scan<T, W, C, K, PASS>, call);
        constexpr std::integral_constant<int, COLUMNS<T>> columns;
        constexpr std::integral_constant<int, 2 * COLUMNS<T>> twice;
        if constexpr (allows_twice(width > 1, depths, sizeof(T)))
            if (plan.columns == twice) return scan_with(width, depths, twice);
        scan_with(width, depths, columns);
    });
}

template <Pass PASS>
void launch_views(const Views& call, const Stream& stream) {
    constexpr bool VIEWS = PASS == Pass::views;
    with_dtype(call.dtype, [&](auto stored) {
        using T = decltype(stored);
        using A = arithmetic<T>;
        const int64_t chunks = call.layout.num_chunks, d = call.features;
        const int stages = scan_stages<T, PASS>(d, call.depths, "views");
        const bool wide = !stages && forward_plan<T>(d, call.depths).blocks > 1;
        const Scratch<A> scratch(stream, {chunks * d, VIEWS ? chunks * d : 0, chunks, chunks, wide ? chunks * CHUNK_TOKENS : 0});
        ScanArguments<T> scan{};
        scan.layout = call.layout;
        scan.features = int(d);
        scan.depths = int(call.depths);
        scan.stages = stages;
        scan.states = Tensors<const T>::from(call.states, call.depths);
        scan.alpha = static_cast<const A*>(call.alpha);
        scan.weight = static_cast<const A*>(call.weight);
        scan.bias = static_cast<const A*>(call.bias);
        scan.reads_prompts = !call.response_only;
        scan.reads_responses = true;
        scan.last = static_cast<A*>(call.last);
        scan.weighted = scratch[0];
        scan.response_sums = VIEWS ? scratch[1] : nullptr;
        scan.tops = scratch[2];
        scan.totals = scratch[3];
        if (wide) {
            scan.logits = scratch[4];
            DotsArguments<T> arguments{call.layout, int(d), int(call.depths), call.response_only, scan.states, scan.alpha,
                                       scan.weight, nullptr, nullptr, scratch[4], nullptr};
            launch_dots(stream, "views", arguments);
        }
        launch_scan<T, PASS>(stream, "views", scan);
        CombineArguments<A> combine{};
        combine.layout = call.layout;
        combine.features = int(d);
        combine.response_sums = scan.response_sums;
        combine.weighted = scan.weighted;
        combine.tops = scan.tops;
        combine.totals = scan.totals;
        combine.response = static_cast<A*>(call.mean);
        combine.attention = static_cast<A*>(call.attention);
        combine.log_sum_exp = static_cast<A*>(call.log_sum_exp);
        launch_combine(stream, "views", combine);
    });
}

}  // namespace

void means(const Means& call, const Stream& stream) {
    with_dtype(call.dtype, [&](auto stored) {
        using T = decltype(stored);
        using A = arithmetic<T>;
        const int64_t chunk_rows = call.layout.num_chunks * call.features;
        const bool prompts = call.prompt || call.all, responses = call.response || call.all;
        const Scratch<A> sums(stream, {prompts ? chunk_rows : 0, responses ? chunk_rows : 0});
        ScanArguments<T> scan{};
        scan.layout = call.layout;
        scan.features = int(call.features);
        scan.depths = 1;
        scan.stages = scan_stages<T, Pass::means>(call.features, 1, "means");
        scan.reads_prompts = prompts;
        scan.reads_responses = responses;
        scan.states.of[0] = static_cast<const T*>(call.hidden);
        scan.prompt_sums = prompts ? sums[0] : nullptr;
        scan.response_sums = responses ? sums[1] : nullptr;
        launch_scan<T, Pass::means>(stream, "means", scan);
        CombineArguments<A> combine{};
        combine.layout = call.layout;
        combine.features = int(call.features);
        combine.prompt_sums = scan.prompt_sums;
        combine.response_sums = scan.response_sums;
        combine.prompt = static_cast<A*>(call.prompt);
        combine.response = static_cast<A*>(call.response);
        combine.all = static_cast<A*>(call.all);
        launch_combine(stream, "means", combine);
    });
}

void depth_weights(const DepthWeights& call, const Stream& stream) {
    with_arithmetic(call.dtype, [&](auto number) {
        using A = decltype(number);
        const GateArguments<A> arguments{int(call.features), int(call.depths), static_cast<const A*>(call.context),
                                         static_cast<const A*>(call.weight), static_cast<const A*>(call.bias),
                                         static_cast<A*>(call.alpha)};
        with_vectors<A>(call.features, [&](auto width) {
            launch(stream, "depth_weights", dim3(unsigned(call.num_sequences)), GATE_THREADS, sizeof(GateSums<A>), gate<A, width>,
                   arguments);
        });
    });
}

void views(const Views& call, const Stream& stream) {
    if (call.alpha) launch_views<Pass::views>(call, stream);
    else launch_views<Pass::attention>(call, stream);
}

}  // namespace adajudge::cuda
