// Pooling forward. A block scans one chunk of a sequence, its threads side by side over the features, and leaves the
// chunk's sums; a second kernel combines each sequence's chunks in order. So a sequence's bits depend on nothing else in the
// batch, nothing is summed by atomics, and nothing of size [T, d] is written.
#pragma once

#include "block.cuh"
#include "layout.cuh"
#include "row_ring.cuh"

namespace adajudge::cuda {

// At most, of a block that scans: 128 registers a thread, or 255 where K is any number or loads are narrow.
template <int W, int K>
constexpr int SCAN_THREADS = W > 1 && K < MAX_DEPTHS ? 512 : 256;

template <class A>
constexpr A INFINITE = A(INFINITY);

// What a pass over the states is for: the means of one state, its attention view, or all views of a mixture of K by the
// depth weights. The backward has the last two: that of means reads no states.
enum class Pass { means, attention, views };

// One token's K states in the columns of a thread, as they are stored; K = MAX_DEPTHS stands for any number of states.
template <class T, int W, int C, int K>
struct StoredStates {
    using A = arithmetic<T>;
    Stored<T, W> of[K][C / W];

    // From the rows that row(k) points to; zeros where they are not wanted.
    template <class Row>
    __device__ void load(Row row, const Columns<W, C>& columns, int depths, bool wanted) {
#pragma unroll
        for (int k = 0; k < K; ++k) columns.load_stored(row(k), wanted && (K < MAX_DEPTHS || k < depths), of[k]);
    }

    __device__ void widen(int k, A (&to)[C]) const {
#pragma unroll
        for (int v = 0; v < C / W; ++v) of[k][v].widen(to + v * W);
    }

    __device__ void forget_widened() {
#pragma unroll
        for (int k = 0; k < K; ++k)
#pragma unroll
            for (int v = 0; v < C / W; ++v) of[k][v].forget_widened();
    }

    // h = sum_k alpha_k H_k
    __device__ void mix(const A (&alpha)[K], A (&h)[C]) const {
        widen(0, h);
#pragma unroll
        for (int c = 0; c < C; ++c) h[c] *= alpha[0];
#pragma unroll
        for (int k = 1; k < K; ++k) {
            A x[C];
            widen(k, x);
#pragma unroll
            for (int c = 0; c < C; ++c) h[c] = multiply_add(x[c], alpha[k], h[c]);
        }
    }
};

// A sequence's alpha_k; for a state as it is (alpha null), 1.
template <int K, class A>
__device__ void load_depth_weights(const A* alpha, int64_t sequence, int depths, A (&to)[K]) {
#pragma unroll
    for (int k = 0; k < K; ++k) to[k] = alpha == nullptr ? A(1) : k < depths ? alpha[sequence * depths + k] : A(0);
}

template <class T>
struct ScanArguments {
    using A = arithmetic<T>;
    Layout layout;
    int features, depths;
    bool reads_prompts, reads_responses;  // no other token's states are loaded
    Tensors<const T> states;
    const A* alpha;                  // [B, K]; views
    const A *weight, *bias;          // [d], [1]; views and attention
    const A* logits;                 // [N * CHUNK_TOKENS] of rows that no block holds whole, else null; views and attention
    int stages;                      // of `ring_scan`
    A* last;                         // [B, d]; views
    A *prompt_sums, *response_sums;  // [N, d]; means, null where nobody wants them, and the responses' for views
    A *weighted, *tops, *totals;     // [N, d], [N], [N]: sum of exp(logit - top) h, top, sum of exp(logit - top)
};

// Tokens that a block works on together. With more, more loads are under way and fewer barriers needed, until registers run
// out; where a ring holds what is under way, two suffice, while a step's bytes leave room for other stages.
template <class T, int C, int K, bool RING>
constexpr int SCAN_TOKENS = [] {
    constexpr int token_bytes = K * C * int(sizeof(T));  // of a thread
    if (RING) return token_bytes <= 96 ? 2 : 1;
    return token_bytes <= 48 ? 32 / C : token_bytes <= 96 ? 16 / C : 1;
}();

template <class T, int W, int C, int K, bool RING>
struct alignas(16) ScanShared {
    static constexpr int TOKENS = SCAN_TOKENS<T, C, K, RING>;
    using Ring = RowRing<T, TOKENS, K>;  // that follows in shared memory, if there is one
    BlockSums<arithmetic<T>, TOKENS, SCAN_THREADS<W, K> / WARP> logits;
    int8_t roles[CHUNK_TOKENS];
};

template <class T, int W, int C, int K, Pass PASS, bool RING>
__device__ void scan_chunk(const ScanArguments<T>& call) {
    using A = arithmetic<T>;
    using Shared = ScanShared<T, W, C, K, RING>;
    constexpr int TOKENS = Shared::TOKENS;
    constexpr bool VIEWS = PASS == Pass::views, ATTENDS = PASS != Pass::means;
    const bool adds_prompts = !ATTENDS && call.prompt_sums, adds_responses = VIEWS || (!ATTENDS && call.response_sums);
    auto& shared = *static_cast<Shared*>(shared_memory());
    const int64_t index = blockIdx.x, d = call.features;
    const Chunk chunk = chunk_at(call.layout, index);
    const Sequence& s = chunk.sequence;
    const Columns<W, C> columns(call.features);
    typename Shared::Ring ring(&shared + 1, RING ? call.stages : 0, call.features);
    load_roles(call.layout, chunk, shared.roles);
    const auto start_of = [&](int token) { return s.slot(chunk.begin + token) * d; };
    const auto is_response = [&](int token) { return token < chunk.count && shared.roles[token] == RESPONSE; };
    const auto is_seen = [&](int token) {
        return token < chunk.count && (is_response(token) ? call.reads_responses : call.reads_prompts);
    };
    const auto ask = [&](int step) {
        if (threadIdx.x == 0 && step < chunk.count)
            ring.ask(call.states, [&](int t) { return is_seen(step + t); }, [&](int t) { return start_of(step + t); });
    };
    if constexpr (RING)
        for (int stage = 0; stage < call.stages; ++stage) ask(stage * TOKENS);
    const int last = s.position(s.last_response) - chunk.begin;  // of the chunk's tokens, if it is one
    A alpha[K], w[C], bias = 0;
    if constexpr (VIEWS) load_depth_weights<K>(call.alpha, chunk.sequence_index, call.depths, alpha);
    if constexpr (ATTENDS) {
        columns.load(call.weight, w);
        bias = *call.bias;
    }
    A weighted[C] = {}, prompts[C] = {}, responses[C] = {};
    A top = -INFINITE<A>, total = 0;
    for (int step = 0; step < chunk.count; step += TOKENS) {
        A h[TOKENS][C], logits[TOKENS];
        bool seen[TOKENS], response[TOKENS];
        StoredStates<T, W, C, K> states[TOKENS];
        if constexpr (RING) ring.wait();
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            const int64_t start = start_of(step + t);
            response[t] = is_response(step + t);
            seen[t] = is_seen(step + t);
            const auto row = [&](int k) { return RING ? ring.row(t, k) : call.states.of[k] + start; };
            states[t].load(row, columns, call.depths, seen[t]);
        }
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            if constexpr (VIEWS) states[t].mix(alpha, h[t]);
            else states[t].widen(0, h[t]);
            if (VIEWS && step + t == last)
                columns.store(call.last + chunk.sequence_index * d, h[t]);
        }
        if constexpr (ATTENDS) {
            if (!RING && call.logits) {
#pragma unroll
                for (int t = 0; t < TOKENS; ++t) logits[t] = seen[t] ? call.logits[index * CHUNK_TOKENS + step + t] : A(0);
            } else {
#pragma unroll
                for (int t = 0; t < TOKENS; ++t) {
                    logits[t] = 0;
#pragma unroll
                    for (int c = 0; c < C; ++c) logits[t] = multiply_add(h[t][c], w[c], logits[t]);
                }
                shared.logits.sum(logits, step / TOKENS);
                if constexpr (RING) ask(step + call.stages * TOKENS);
            }
            A above = top;
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) {
                logits[t] = seen[t] ? logits[t] + bias : -INFINITE<A>;
                above = larger(above, logits[t]);
            }
            const A safe = above == -INFINITE<A> ? A(0) : above;  // while all logits are -inf
            const A rescale = exp(top - safe);
            A betas[TOKENS], beta_sum = 0;
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) beta_sum += betas[t] = exp(logits[t] - safe);
            total = multiply_add(total, rescale, beta_sum);
            top = above;
#pragma unroll
            for (int c = 0; c < C; ++c) {
                A sum = h[0][c] * betas[0];
#pragma unroll
                for (int t = 1; t < TOKENS; ++t) sum = multiply_add(h[t][c], betas[t], sum);
                weighted[c] = multiply_add(weighted[c], rescale, sum);
            }
        }
        const auto add = [&](A (&sums)[C], bool to_responses) {
#pragma unroll
            for (int c = 0; c < C; ++c) {
                A sum = response[0] == to_responses ? h[0][c] : A(0);
#pragma unroll
                for (int t = 1; t < TOKENS; ++t) sum += response[t] == to_responses ? h[t][c] : A(0);
                sums[c] += sum;
            }
        };
        if (adds_responses) add(responses, true);
        if (adds_prompts) add(prompts, false);
        if constexpr (RING && !ATTENDS) {
            __syncthreads();
            ask(step + call.stages * TOKENS);
        }
    }
    if (adds_prompts) columns.store(call.prompt_sums + index * d, prompts);
    if (adds_responses) columns.store(call.response_sums + index * d, responses);
    if constexpr (ATTENDS) {
        columns.store(call.weighted + index * d, weighted);
        if (blockIdx.y == 0 && threadIdx.x == 0) {
            call.tops[index] = top;
            call.totals[index] = total;
        }
    }
}

// Grid (chunks, blocks of features: 1 unless the logits are given).
template <class T, int W, int C, int K, Pass PASS>
__global__ void __launch_bounds__(SCAN_THREADS<W, K>, 1) scan(ScanArguments<T> call) {
    scan_chunk<T, W, C, K, PASS, false>(call);
}

// The same, states by the copy engine. Grid (chunks).
template <class T, int W, int C, int K, Pass PASS>
__global__ void __launch_bounds__(SCAN_THREADS<W, K>, 1) ring_scan(ScanArguments<T> call) {
#if ADAJUDGE_HAS_COPY_ENGINE
    scan_chunk<T, W, C, K, PASS, true>(call);
#else
    __trap();  // see `uses_copy_engine`
#endif
}

// -- Sequences from their chunks --------------------------------------------------------------------------------

constexpr int ROWS_UNDER_WAY = 4;  // of a thread that adds rows

// How a block adds rows: ACROSS threads side by side, W columns each, and ROWS groups of them that take the rows in turn.
template <class A, int W, int ACROSS, int ROWS>
struct RowSums {
    static constexpr int COLUMNS = ACROSS * W, THREADS = ACROSS * ROWS;
    A parts[ROWS][COLUMNS];

    // Sum over i of share(i) * rows[i][column], i from 0 to `count`: each group adds its rows, then the groups' sums are added
    // in order. Valid in the first COLUMNS threads, a column each. All threads of the block call it.
    template <class Share>
    __device__ A sum(const A* rows, int64_t count, int64_t d, int64_t first_column, Share share) {
        const int group = threadIdx.x / ACROSS, across = threadIdx.x % ACROSS * W;
        const bool inside = first_column + across < d;
        rows += first_column + across;
        A sums[W] = {};
#pragma unroll 1
        for (int64_t first = group; first < count; first += ROWS * ROWS_UNDER_WAY) {
            Stored<A, W> stored[ROWS_UNDER_WAY];
            A shares[ROWS_UNDER_WAY];
#pragma unroll
            for (int r = 0; r < ROWS_UNDER_WAY; ++r) {
                const int64_t i = first + r * ROWS;
                stored[r] = Stored<A, W>::load(rows + i * d, inside && i < count);
                shares[r] = i < count ? share(i) : A(0);
            }
#pragma unroll
            for (int r = 0; r < ROWS_UNDER_WAY; ++r) {
                A x[W];
                stored[r].widen(x);
#pragma unroll
                for (int n = 0; n < W; ++n) sums[n] = multiply_add(shares[r], x[n], sums[n]);
            }
        }
        __syncthreads();  // `parts` may still be read from the sum before
#pragma unroll
        for (int n = 0; n < W; ++n) parts[group][across + n] = sums[n];
        __syncthreads();
        A total = 0;
        if (int(threadIdx.x) < COLUMNS) {
#pragma unroll
            for (int i = 0; i < ROWS; ++i) total += parts[i][threadIdx.x];
        }
        return total;
    }
};

// Few chunks of many sequences; many rows.
template <class A, int W>
using ChunkSums = RowSums<A, W, 64, 4>;
template <class A, int W>
using ManyRowSums = RowSums<A, W, 32, 16>;

template <class A>
struct CombineArguments {
    Layout layout;
    int features;
    const A *prompt_sums, *response_sums, *weighted, *tops, *totals;  // as `scan` wrote them; null where not wanted
    A *prompt, *response, *all, *attention, *log_sum_exp;             // [B, d] or null; [B]
};

// Grid (B, blocks of features).
template <class A, int W>
__global__ void __launch_bounds__(ChunkSums<A, W>::THREADS, 1) combine(CombineArguments<A> call) {
    using Sums = ChunkSums<A, W>;
    auto& sums = *static_cast<Sums*>(shared_memory());
    const int64_t b = blockIdx.x, d = call.features, begin = int64_t(blockIdx.y) * Sums::COLUMNS, column = begin + threadIdx.x;
    const int lane = threadIdx.x % WARP;
    const Sequence s = sequence_at(call.layout, b);
    const int64_t first = s.first_chunk, count = s.chunks(), out = b * d + column;
    const bool writes = int(threadIdx.x) < Sums::COLUMNS && column < d;
    const auto evenly = [](int64_t) { return A(1); };
    A prompts = 0, responses = 0;
    if (call.prompt_sums) prompts = sums.sum(call.prompt_sums + first * d, count, d, begin, evenly);
    if (call.response_sums) responses = sums.sum(call.response_sums + first * d, count, d, begin, evenly);
    if (writes) {
        if (call.prompt) call.prompt[out] = prompts / A(s.prompts > 0 ? s.prompts : 1);
        if (call.response) call.response[out] = responses / A(s.responses);
        if (call.all) call.all[out] = (prompts + responses) / A(s.prompts + s.responses);
    }
    if (call.attention) {
        const A *tops = call.tops + first, *totals = call.totals + first;
        A top = -INFINITE<A>, total = 0;
        for (int64_t i = lane; i < count; i += WARP) top = larger(top, tops[i]);
        top = warp_max(top);
        const A safe = top == -INFINITE<A> ? A(0) : top;
        for (int64_t i = lane; i < count; i += WARP) total = multiply_add(totals[i], exp(tops[i] - safe), total);
        total = warp_sum(total);
        const auto share = [&](int64_t i) { return exp(tops[i] - safe); };
        const A weighted = sums.sum(call.weighted + first * d, count, d, begin, share);
        if (writes) call.attention[out] = weighted / total;
        if (blockIdx.y == 0 && threadIdx.x == 0) call.log_sum_exp[b] = top + log(total);
    }
}

template <class A>
struct GateArguments {
    int features, depths;
    const A *context, *weight, *bias;  // [B, d], [K, d], [K]
    A* alpha;                          // [B, K]
};

constexpr int GATE_THREADS = 256;
template <class A>
using GateSums = BlockSums<A, MAX_DEPTHS, GATE_THREADS / WARP>;

// alpha = softmax(W c + b). All threads share the features of all logits. Grid (B).
template <class A, int W>
__global__ void __launch_bounds__(GATE_THREADS, 1) gate(GateArguments<A> call) {
    const int64_t b = blockIdx.x, d = call.features;
    A logits[MAX_DEPTHS] = {};
#pragma unroll 2  // more of them on their way
    for (int64_t j = threadIdx.x * W; j < d; j += GATE_THREADS * W) {
        A context[W];
        Stored<A, W> rows[MAX_DEPTHS];  // all on their way at once
#pragma unroll
        for (int k = 0; k < MAX_DEPTHS; ++k) rows[k] = Stored<A, W>::load(call.weight + k * d + j, k < call.depths);
        load<W>(call.context + b * d + j, context);
#pragma unroll
        for (int k = 0; k < MAX_DEPTHS; ++k) {
            A weight[W];
            rows[k].widen(weight);
#pragma unroll
            for (int n = 0; n < W; ++n) logits[k] = multiply_add(weight[n], context[n], logits[k]);
        }
    }
    static_cast<GateSums<A>*>(shared_memory())->sum(logits, 0);
    A top = -INFINITE<A>, total = 0;
#pragma unroll
    for (int k = 0; k < MAX_DEPTHS; ++k) {
        logits[k] = k < call.depths ? logits[k] + call.bias[k] : -INFINITE<A>;
        top = larger(top, logits[k]);
    }
#pragma unroll
    for (int k = 0; k < MAX_DEPTHS; ++k) total += logits[k] = exp(logits[k] - top);
#pragma unroll
    for (int k = 0; k < MAX_DEPTHS; ++k)
        if (int(threadIdx.x) == k && k < call.depths) call.alpha[b * call.depths + k] = logits[k] / total;
}

// -- Rows that no block holds whole ---------------------------------------------------------------------------------

template <class T>
struct DotsArguments {
    using A = arithmetic<T>;
    Layout layout;
    int features, depths;
    bool response_only;
    Tensors<const T> states;
    const A *alpha, *weight;
    const A *grad, *pooled;  // [B, d], null in the forward
    A *logits, *grad_dots;   // [N * CHUNK_TOKENS]: w . h, and in the backward g_A . (h - z_A)
};

constexpr int DOTS_THREADS = 256;

// A warp for each token at a time. Grid (chunks).
template <class T, int W>
__global__ void __launch_bounds__(DOTS_THREADS, 1) dots(DotsArguments<T> call) {
    using A = arithmetic<T>;
    const int64_t index = blockIdx.x, d = call.features;
    const Chunk chunk = chunk_at(call.layout, index);
    const int lane = threadIdx.x % WARP;
    A alpha[MAX_DEPTHS];
    load_depth_weights<MAX_DEPTHS>(call.alpha, chunk.sequence_index, call.depths, alpha);
    for (int t = threadIdx.x / WARP; t < chunk.count; t += DOTS_THREADS / WARP) {
        const int slot = chunk.sequence.slot(chunk.begin + t);
        if (call.response_only && call.layout.roles[slot] != RESPONSE) continue;
        A logit = 0, grad_dot = 0;
        for (int64_t j = lane * W; j < d; j += WARP * W) {
            A h[W] = {}, x[W], logit_part = 0, dot_part = 0;
            Stored<T, W> states[MAX_DEPTHS];  // all on their way at once
#pragma unroll
            for (int k = 0; k < MAX_DEPTHS; ++k) states[k] = Stored<T, W>::load(call.states.of[k] + slot * d + j, k < call.depths);
#pragma unroll
            for (int k = 0; k < MAX_DEPTHS; ++k)
                if (k < call.depths) {
                    states[k].widen(x);
#pragma unroll
                    for (int n = 0; n < W; ++n) h[n] = multiply_add(x[n], alpha[k], h[n]);
                }
            load<W>(call.weight + j, x);
#pragma unroll
            for (int n = 0; n < W; ++n) logit_part = multiply_add(h[n], x[n], logit_part);
            logit += logit_part;
            if (call.grad) {
                A grad[W];
                load<W>(call.grad + chunk.sequence_index * d + j, grad);
                load<W>(call.pooled + chunk.sequence_index * d + j, x);
#pragma unroll
                for (int n = 0; n < W; ++n) dot_part = multiply_add(h[n] - x[n], grad[n], dot_part);
                grad_dot += dot_part;
            }
        }
        logit = warp_sum(logit);
        if (call.grad) grad_dot = warp_sum(grad_dot);
        if (lane == 0) {
            call.logits[index * CHUNK_TOKENS + t] = logit;
            if (call.grad) call.grad_dots[index * CHUNK_TOKENS + t] = grad_dot;
        }
    }
}

}  // namespace adajudge::cuda
