// Pooling backward. A block goes over one chunk as the forward does, recomputes what the forward did not keep, and writes its
// tokens' gradients, and its part of those that are sums over tokens, which small kernels add up in order.
#pragma once

#include "pooling.cuh"

namespace adajudge::cuda {

template <class T>
struct ScanBackwardArguments {
    using A = arithmetic<T>;
    Layout layout;
    int features, depths;
    bool response_only, shared;                     // shared: gradients of prompt tokens are left to `spread_attention`
    Tensors<const T> states;
    Tensors<T> grad_states;
    const A* alpha;                                 // [B, K]; views
    const A *weight, *bias;                         // [d], [1]
    const A *logits, *grad_dots;                    // [N * CHUNK_TOKENS] of rows that no block holds whole, else null
    int stages;                                     // of `ring_scan_backward`
    const A *grad_last, *grad_mean;                 // [B, d]; views
    const A *grad_attention, *pooled, *log_sum_exp; // [B, d], [B, d], [B]
    A *betas, *grad_logits;                         // [N * CHUNK_TOKENS] where prompts are shared
    A* grad_alpha_parts;                            // [N, blocks of features, K]; views
    A* grad_weight_parts;                           // [N, d]
};

// At most, of a block: 168 registers a thread where it has 16 columns.
template <int W, int C, int K>
constexpr int BACKWARD_THREADS = C > 8 ? 384 : SCAN_THREADS<W, K>;

// Tokens that a block works on together.
template <class T, int C, int K>
constexpr int BACKWARD_TOKENS = K * C * int(sizeof(T)) <= 48 ? 2 : 1;

template <class T, int W, int C, int K>
struct alignas(16) ScanBackwardShared {
    static constexpr int TOKENS = BACKWARD_TOKENS<T, C, K>;
    using Ring = RowRing<T, TOKENS, K>;  // that follows in shared memory, if there is one
    BlockSums<arithmetic<T>, 2 * TOKENS, BACKWARD_THREADS<W, C, K> / WARP> dots;
    BlockSums<arithmetic<T>, MAX_DEPTHS, BACKWARD_THREADS<W, C, K> / WARP> grad_alpha;
    int8_t roles[CHUNK_TOKENS];
};

// g_t = [t = tau] g_L + m_t / n g_M + beta_t g_A + dlogit_t w with dlogit_t = beta_t (g_A . (h_t - z_A));
// dH_k,t = alpha_k g_t, dalpha_k = sum_t g_t . H_k,t, dw = sum_t dlogit_t (h_t - z_A): the dlogit of a sequence sum to zero,
// and so a mean of its states need not cancel.
template <class T, int W, int C, int K, Pass PASS, bool RING>
__device__ void scan_chunk_backward(const ScanBackwardArguments<T>& call) {
    using A = arithmetic<T>;
    using Shared = ScanBackwardShared<T, W, C, K>;
    constexpr int TOKENS = Shared::TOKENS;
    constexpr bool VIEWS = PASS == Pass::views;
    auto& shared = *static_cast<Shared*>(shared_memory());
    const int64_t index = blockIdx.x, d = call.features;
    const Chunk chunk = chunk_at(call.layout, index);
    const Sequence& s = chunk.sequence;
    const int64_t b = chunk.sequence_index;
    const Columns<W, C> columns(call.features);
    typename Shared::Ring ring(&shared + 1, RING ? call.stages : 0, call.features);
    load_roles(call.layout, chunk, shared.roles);
    const auto start_of = [&](int token) { return s.slot(chunk.begin + token) * d; };
    const auto is_response = [&](int token) { return token < chunk.count && shared.roles[token] == RESPONSE; };
    const auto is_seen = [&](int token) { return token < chunk.count && (!call.response_only || is_response(token)); };
    const auto ask = [&](int step) {
        if (threadIdx.x == 0 && step < chunk.count)
            ring.ask(call.states, [&](int t) { return is_seen(step + t); }, [&](int t) { return start_of(step + t); });
    };
    if constexpr (RING)
        for (int stage = 0; stage < call.stages; ++stage) ask(stage * TOKENS);
    const int last = s.position(s.last_response) - chunk.begin;  // of the chunk's tokens, if it is one
    A alpha[K], w[C], grad[C], pooled[C], grad_mean[C] = {}, grad_weight[C] = {}, grad_alpha[MAX_DEPTHS] = {};
    if constexpr (VIEWS) load_depth_weights<K>(call.alpha, b, call.depths, alpha);
    columns.load(call.weight, w);
    columns.load(call.grad_attention + b * d, grad);
    columns.load(call.pooled + b * d, pooled);
    if constexpr (VIEWS) {
        columns.load(call.grad_mean + b * d, grad_mean);
#pragma unroll
        for (int c = 0; c < C; ++c) grad_mean[c] /= A(s.responses);
    }
    const A bias = *call.bias, log_sum_exp = call.log_sum_exp[b];
    for (int step = 0; step < chunk.count; step += TOKENS) {
        StoredStates<T, W, C, K> states[TOKENS];
        A centred[TOKENS][C], dots[2 * TOKENS] = {};  // h - z_A; w . h and g_A . (h - z_A)
        int64_t rows[TOKENS];
        bool valid[TOKENS], seen[TOKENS], response[TOKENS];
        if constexpr (RING) ring.wait();
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            rows[t] = start_of(step + t);
            valid[t] = TOKENS == 1 || step + t < chunk.count;
            response[t] = is_response(step + t);
            seen[t] = is_seen(step + t);
            const auto row = [&](int k) { return RING ? ring.row(t, k) : call.states.of[k] + rows[t]; };
            states[t].load(row, columns, call.depths, seen[t]);
        }
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            A h[C];
            if constexpr (VIEWS) states[t].mix(alpha, h);
            else states[t].widen(0, h);
#pragma unroll
            for (int c = 0; c < C; ++c) {
                centred[t][c] = h[c] - pooled[c];
                dots[2 * t] = multiply_add(h[c], w[c], dots[2 * t]);
                dots[2 * t + 1] = multiply_add(centred[t][c], grad[c], dots[2 * t + 1]);
            }
        }
        if (!RING && call.logits) {
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) {
                const int64_t place = index * CHUNK_TOKENS + step + t;
                dots[2 * t] = seen[t] ? call.logits[place] : A(0);
                dots[2 * t + 1] = seen[t] ? call.grad_dots[place] : A(0);
            }
        } else {
            shared.dots.sum(dots, step / TOKENS);
            if constexpr (RING) ask(step + call.stages * TOKENS);
        }
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            if constexpr (VIEWS) states[t].forget_widened();  // else kernels of K = 3 and two bytes spill
            const A beta = seen[t] ? exp(dots[2 * t] + bias - log_sum_exp) : A(0);
            const A grad_logit = seen[t] ? beta * dots[2 * t + 1] : A(0);
            A g[C];
#pragma unroll
            for (int c = 0; c < C; ++c) {
                g[c] = seen[t] ? multiply_add(beta, grad[c], grad_logit * w[c]) : A(0);
                if (VIEWS && response[t]) g[c] += grad_mean[c];
                if (seen[t]) grad_weight[c] = multiply_add(grad_logit, centred[t][c], grad_weight[c]);
            }
            if (VIEWS && step + t == last) {
                A grad_last[C];
                columns.load(call.grad_last + b * d, grad_last);
#pragma unroll
                for (int c = 0; c < C; ++c) g[c] += grad_last[c];
            }
            const bool own = valid[t] && (!call.shared || chunk.begin + step + t >= s.first());
            if constexpr (VIEWS) {
#pragma unroll
                for (int k = 0; k < K; ++k)
                    if (K < MAX_DEPTHS || k < call.depths) {
                        A x[C], grad_state[C];
                        states[t].widen(k, x);
#pragma unroll
                        for (int c = 0; c < C; ++c) {
                            grad_alpha[k] = multiply_add(g[c], x[c], grad_alpha[k]);
                            grad_state[c] = g[c] * alpha[k];
                        }
                        if (own) columns.store(call.grad_states.of[k] + rows[t], grad_state);
                    }
            } else if (own) {
                columns.store(call.grad_states.of[0] + rows[t], g);
            }
            if (call.shared && valid[t] && blockIdx.y == 0 && threadIdx.x == 0) {
                call.betas[index * CHUNK_TOKENS + step + t] = beta;
                call.grad_logits[index * CHUNK_TOKENS + step + t] = grad_logit;
            }
        }
    }
    columns.store(call.grad_weight_parts + index * d, grad_weight);
    if constexpr (VIEWS) {
        shared.grad_alpha.sum(grad_alpha, 0);
        A* parts = call.grad_alpha_parts + (index * gridDim.y + blockIdx.y) * call.depths;
#pragma unroll
        for (int k = 0; k < MAX_DEPTHS; ++k)
            if (int(threadIdx.x) == k && k < call.depths) parts[k] = grad_alpha[k];
    }
}

// Grid (chunks, blocks of features: 1 unless the logits are given).
template <class T, int W, int C, int K, Pass PASS>
__global__ void __launch_bounds__(BACKWARD_THREADS<W, C, K>, 1) scan_backward(ScanBackwardArguments<T> call) {
    scan_chunk_backward<T, W, C, K, PASS, false>(call);
}

// The same, states by the copy engine. Grid (chunks).
template <class T, int W, int C, int K, Pass PASS>
__global__ void __launch_bounds__(BACKWARD_THREADS<W, C, K>, 1) ring_scan_backward(ScanBackwardArguments<T> call) {
#if ADAJUDGE_HAS_COPY_ENGINE
    scan_chunk_backward<T, W, C, K, PASS, true>(call);
#else
    __trap();  // see `uses_copy_engine`
#endif
}

template <class A>
struct SumAlphaArguments {
    Layout layout;
    int depths, blocks;  // blocks of features that a chunk has parts of
    const A* parts;
    A* grad_alpha;  // [B, K]
};

// Depth weights' gradient of a sequence: a warp adds its chunks' parts. Grid (B).
template <class A>
__global__ void __launch_bounds__(WARP, 1) sum_alpha_parts(SumAlphaArguments<A> call) {
    const Sequence s = sequence_at(call.layout, blockIdx.x);
    const int64_t first = int64_t(s.first_chunk) * call.blocks, count = int64_t(s.chunks()) * call.blocks;
    for (int k = 0; k < call.depths; ++k) {
        A sum = 0;
        for (int64_t i = threadIdx.x; i < count; i += WARP) sum += call.parts[(first + i) * call.depths + k];
        sum = warp_sum(sum);
        if (threadIdx.x == 0) call.grad_alpha[blockIdx.x * int64_t(call.depths) + k] = sum;
    }
}

// out = the sum of `count` rows [count, d]. Grid (blocks of features).
template <class A, int W>
__global__ void __launch_bounds__(ManyRowSums<A, W>::THREADS, 1) add_rows(const A* rows, int64_t count, int64_t d, A* out) {
    using Sums = ManyRowSums<A, W>;
    const int64_t begin = int64_t(blockIdx.x) * Sums::COLUMNS, column = begin + threadIdx.x;
    const A sum = static_cast<Sums*>(shared_memory())->sum(rows, count, d, begin, [](int64_t) { return A(1); });
    if (int(threadIdx.x) < Sums::COLUMNS && column < d) out[column] = sum;
}

constexpr int SPREAD_THREADS = 128;

template <class T>
struct SpreadMeansArguments {
    using A = arithmetic<T>;
    Layout layout;
    int features;
    const A *prompt, *response, *all;  // [B, d] or null
    T* grad_hidden;
};

// Gradient of means: every token gets its readers' shares, in their order. Grid (chunks of groups, blocks of features).
template <class T, int W>
__global__ void __launch_bounds__(SPREAD_THREADS, 1) spread_means(SpreadMeansArguments<T> call) {
    using A = arithmetic<T>;
    const int64_t d = call.features;
    const GroupChunk piece = group_chunk_at(call.layout, blockIdx.x);
    const Columns<W, W> columns(call.features);
    A prompts[W] = {}, responses[W] = {}, grad[W];
    for (int64_t b = piece.first_reader; b < piece.first_reader + piece.readers; ++b) {
        const Sequence s = sequence_at(call.layout, b);
        const auto add = [&](const A* means, int count, bool to_prompts, bool to_responses) {
            if (!means || !count) return;
            columns.load(means + b * d, grad);
#pragma unroll
            for (int n = 0; n < W; ++n) {
                grad[n] /= A(count);
                if (to_prompts) prompts[n] += grad[n];
                if (to_responses) responses[n] += grad[n];
            }
        };
        add(call.all, s.prompts + s.responses, true, true);
        add(call.prompt, s.prompts, true, false);
        add(call.response, s.responses, false, true);
    }
    for (int t = 0; t < piece.count; ++t) {
        const int slot = piece.start + piece.begin + t;
        const bool response = call.layout.roles[slot] == RESPONSE;
#pragma unroll
        for (int n = 0; n < W; ++n) grad[n] = response ? responses[n] : prompts[n];
        columns.store(call.grad_hidden + slot * d, grad);
    }
}

template <class T>
struct SpreadAttentionArguments {
    using A = arithmetic<T>;
    Layout layout;
    int features, depths;
    bool response_only;  // the attention view reads no prompt
    Tensors<T> grad_states;
    const A *alpha, *weight, *grad_attention, *betas, *grad_logits;
};

// Tokens that a thread has at once, so that a candidate's gradient is read for all of them.
template <int K>
constexpr int SPREAD_TOKENS = K < MAX_DEPTHS ? 2 : 1;

// Gradient of shared prompt tokens: dH_k,t = sum_b alpha_bk beta_bt g_A,b + (sum_b alpha_bk dlogit_bt) w over the candidates
// that read the token, in their order; zeros if there is none. Needs no states. Grid (chunks of groups, blocks of features).
template <class T, int W, int K>
__global__ void __launch_bounds__(SPREAD_THREADS, 1) spread_attention(SpreadAttentionArguments<T> call) {
    using A = arithmetic<T>;
    constexpr int TOKENS = SPREAD_TOKENS<K>;
    // Groups are the prompts, then a response each, which has its gradient already.
    const int64_t prompts = call.layout.num_groups - call.layout.num_sequences, d = call.features;
    if (call.layout.group_chunks[blockIdx.x] >= prompts) return;
    const GroupChunk piece = group_chunk_at(call.layout, blockIdx.x);
    const int64_t readers = call.response_only ? 0 : piece.readers;
    const Columns<W, W> columns(call.features);
    A w[W] = {};
    if (readers) columns.load(call.weight, w);
    for (int first = 0; first < piece.count; first += TOKENS) {
        A total[TOKENS][K][W] = {}, of_weight[TOKENS][K] = {};
        for (int64_t b = piece.first_reader; b < piece.first_reader + readers; ++b) {
            const int64_t chunk = call.layout.sequences[8 * b + 7], place = chunk * CHUNK_TOKENS + piece.begin + first;
            A grad[W], alpha[K];
            columns.load(call.grad_attention + b * d, grad);
            load_depth_weights<K>(call.alpha, b, call.depths, alpha);
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) {
                const bool valid = first + t < piece.count;
                const A beta = valid ? call.betas[place + t] : A(0), grad_logit = valid ? call.grad_logits[place + t] : A(0);
#pragma unroll
                for (int k = 0; k < K; ++k) {
                    const A share = alpha[k] * beta;
                    of_weight[t][k] = multiply_add(alpha[k], grad_logit, of_weight[t][k]);
#pragma unroll
                    for (int n = 0; n < W; ++n) total[t][k][n] = multiply_add(share, grad[n], total[t][k][n]);
                }
            }
        }
#pragma unroll
        for (int t = 0; t < TOKENS; ++t)
#pragma unroll
            for (int k = 0; k < K; ++k)
                if (first + t < piece.count && (K < MAX_DEPTHS || k < call.depths)) {
#pragma unroll
                    for (int n = 0; n < W; ++n) total[t][k][n] = multiply_add(of_weight[t][k], w[n], total[t][k][n]);
                    columns.store(call.grad_states.of[k] + int64_t(piece.start + piece.begin + first + t) * d, total[t][k]);
                }
    }
}

constexpr int ZERO_THREADS = 256;

template <class T>
struct ZeroArguments {
    const int8_t* roles;
    int64_t tokens;
    int features, count;
    Tensors<T> outputs;  // `count` of them
};

// Zeros in the rows of padding, a warp for each token. Grid (groups of eight tokens).
template <class T, int W>
__global__ void __launch_bounds__(ZERO_THREADS, 1) zero_padding(ZeroArguments<T> call) {
    const int64_t t = int64_t(blockIdx.x) * (ZERO_THREADS / WARP) + threadIdx.x / WARP, d = call.features;
    if (t >= call.tokens || call.roles[t] != PADDING) return;
    const arithmetic<T> zeros[W] = {};
#pragma unroll
    for (int k = 0; k < MAX_DEPTHS; ++k)
        if (k < call.count)
            for (int64_t j = (threadIdx.x % WARP) * W; j < d; j += WARP * W) store<W>(call.outputs.of[k] + t * d + j, zeros);
}

}  // namespace adajudge::cuda
