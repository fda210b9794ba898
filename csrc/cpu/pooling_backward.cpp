// Pooling backward: one pass over the states, chunk by chunk, which writes each token's gradient at once. Prompt tokens
// that several sequences read get theirs in a second pass, summed over the readers in order.
#include "pooling.h"

namespace adajudge::ADAJUDGE_LEVEL {
namespace {

struct Yes {
    static constexpr bool value = true;
};
struct No {
    static constexpr bool value = false;
};

constexpr int64_t STREAMED_BYTES = 32 << 20;  // of gradients: more than caches keep until somebody reads them

template <class T>
struct ScanBackward {
    using A = arithmetic<T>;
    const ViewsBackward& call;
    const T* states[MAX_DEPTHS];
    T* grad_states[MAX_DEPTHS];
    const A *alpha, *weight, *grad_attention, *attention, *log_sum_exp;
    A bias;
    bool shared;             // whether sequences share prompts: their tokens' gradients are left to `prompt_chunk`
    bool streaming;          // whether gradients go past the caches
    A *betas, *grad_logits;  // [N * CHUNK_TOKENS] where prompts are shared
    A *grad_alpha_parts;     // [N, K]
    A *grad_weight_parts;    // [N, d]

    // Rows that a thread fills: H~ - z_A of a token, and what the last and mean view say of a token's gradient: of a prompt
    // token nothing, of a response token g_M / n, of the last one g_L besides.
    struct Rows {
        A *h, *prompt, *response, *last;
    };

    // With h = sum_k alpha_k H_k: returns w . h; writes h - z_A, and g_A times it to `grad_dot`.
    template <class Known>
    ALWAYS_INLINE A mix(Known, const T* const* rows, const A* depth_weights, const A* grad, const A* pooled, A* h,
                        A& grad_dot) const {
        const int64_t d = call.features, depths = Known::known ? Known::known : call.depths;
        const A* w = weight;
        Lanes<A> a[Known::most];
        for (int k = 0; k < depths; ++k) a[k] = broadcast<Lanes<A>>(depth_weights[k]);
        auto logit = broadcast<Lanes<A>>(A(0)), dot = logit;
        for_segments(d, [&](int64_t begin, int64_t end) {
            auto logit_part = broadcast<Lanes<A>>(A(0)), dot_part = logit_part;
            for_lanes(begin, end, [&](int64_t j, auto n) {
                Lanes<A> x = load(rows[0] + j, n) * a[0];
                for (int k = 1; k < depths; ++k) x = multiply_add(load(rows[k] + j, n), a[k], x);
                logit_part = multiply_add(x, load(w + j, n), logit_part);
                const Lanes<A> centred = x - load(pooled + j, n);
                dot_part = multiply_add(centred, load(grad + j, n), dot_part);
                store(h + j, centred, n);
            });
            logit += logit_part;
            dot += dot_part;
        });
        grad_dot = sum<A>(dot);
        return sum<A>(logit);
    }

    // g = base + beta g_A + dlogit w; dH_k = alpha_k g, dalpha_k += g . H_k, dw += dlogit (h - z_A):
    // the dlogit of a sequence sum to zero, and so a mean of its states need not cancel.
    template <bool WRITE, bool STREAM, class Known>
    ALWAYS_INLINE void spread(Known, const T* const* rows, T* const* grad_rows, const A* depth_weights, const A* base,
                              const A* grad, A beta, A grad_logit, const A* h, A* grad_alpha, A* grad_weight) const {
        const A* w = weight;
        const int64_t depths = Known::known ? Known::known : call.depths;
        Lanes<A> a[Known::most];
        for (int k = 0; k < depths; ++k) a[k] = broadcast<Lanes<A>>(depth_weights[k]);
        const auto betas = broadcast<Lanes<A>>(beta), dlogits = broadcast<Lanes<A>>(grad_logit);
        for_segments(call.features, [&](int64_t begin, int64_t end) {
            Lanes<A> dots[Known::most];
            for (int k = 0; k < depths; ++k) dots[k] = broadcast<Lanes<A>>(A(0));
            for_lanes(begin, end, [&](int64_t j, auto n) {
                const Lanes<A> of_view = multiply_add(load(grad + j, n), betas, load(base + j, n));
                const Lanes<A> g = multiply_add(load(w + j, n), dlogits, of_view);
                store(grad_weight + j, multiply_add(load(h + j, n), dlogits, load(grad_weight + j, n)), n);
                if (j % (64 / sizeof(T)) == 0)  // the next token's line, most often: read while these gradients are written
                    for (int k = 0; k < depths; ++k) __builtin_prefetch(rows[k] + j + call.features);
                for (int k = 0; k < depths; ++k) {
                    dots[k] = multiply_add(g, load(rows[k] + j, n), dots[k]);
                    if constexpr (WRITE && STREAM) stream(grad_rows[k] + j, g * a[k], n);
                    if constexpr (WRITE && !STREAM) store(grad_rows[k] + j, g * a[k], n);
                }
            });
            for (int k = 0; k < depths; ++k) grad_alpha[k] += sum<A>(dots[k]);
        });
    }

    template <class Known>
    void token(Known known, const Chunk& c, int64_t index, int64_t position, const Rows& held, A* grad_alpha) const {
        const int64_t d = call.features, slot = c.sequence.slot(position), b = c.sequence_index;
        const bool own = !shared || position >= c.sequence.first();
        const bool response = call.layout.roles[slot] == RESPONSE;
        const int64_t depths = Known::known ? Known::known : call.depths;
        const T* rows[Known::most];
        T* grad_rows[Known::most];
        for (int k = 0; k < depths; ++k) {
            rows[k] = states[k] + slot * d;
            grad_rows[k] = grad_states[k] + slot * d;
        }
        if (call.response_only && !response) {  // nobody has read it
            for (int k = 0; own && k < depths; ++k) fill_zero(grad_rows[k], d);
            return;
        }
        const A one = 1, *depth_weights = alpha ? alpha + b * depths : &one, *grad = grad_attention + b * d;
        A grad_dot;
        const A logit = mix(known, rows, depth_weights, grad, attention + b * d, held.h, grad_dot) + bias;
        const A beta = exp_of_negative(logit - log_sum_exp[b]), grad_logit = beta * grad_dot;
        const A* base = slot == c.sequence.last_response ? held.last : response ? held.response : held.prompt;
        A* grad_weight = grad_weight_parts + index * d;
        const auto spread_as = [&](auto write, auto past_caches) {
            spread<decltype(write)::value, decltype(past_caches)::value>(
                known, rows, grad_rows, depth_weights, base, grad, beta, grad_logit, held.h, grad_alpha, grad_weight);
        };
        if (own && streaming)
            spread_as(Yes{}, Yes{});
        else if (own)
            spread_as(Yes{}, No{});
        else
            spread_as(No{}, No{});
        if (!own) {
            betas[index * CHUNK_TOKENS + position - c.begin] = beta;
            grad_logits[index * CHUNK_TOKENS + position - c.begin] = grad_logit;
        }
    }

    template <class Known>
    void chunk(Known known, int64_t index, A* scratch) const {
        const int64_t d = call.features;
        const Chunk c = chunk_at(call.layout, index);
        const Rows held{scratch, scratch + d, scratch + 2 * d, scratch + 3 * d};
        fill_zero(held.prompt, 3 * d);
        if (alpha) {
            const A *grad_mean = static_cast<const A*>(call.grad_mean) + c.sequence_index * d;
            const A *grad_last = static_cast<const A*>(call.grad_last) + c.sequence_index * d;
            const auto count = broadcast<Lanes<A>>(A(c.sequence.responses));
            for_lanes(0, d, [&](int64_t j, auto n) {
                const Lanes<A> mean = load(grad_mean + j, n) / count;
                store(held.response + j, mean, n);
                store(held.last + j, mean + load(grad_last + j, n), n);
            });
        }
        A* grad_alpha = grad_alpha_parts + index * call.depths;
        fill_zero(grad_alpha, call.depths);
        fill_zero(grad_weight_parts + index * d, d);
        for (int64_t position = c.begin; position < c.end; ++position)
            token(known, c, index, position, held, grad_alpha);
        if (streaming) streamed();
    }

    // dH_k = sum over readers of alpha_k (beta g_A + dlogit w), for a chunk of a prompt's tokens.
    void prompt_chunk(const Group& group, int64_t begin, int64_t end, A* row) const {
        const int64_t d = call.features, depths = call.depths;
        for (int64_t position = begin; position < end; ++position) {
            for (int64_t k = 0; k < depths; ++k) {
                fill_zero(row, d);
                A of_weight = 0;
                for (int64_t b = group.first_reader; !call.response_only && b < group.first_reader + group.readers; ++b) {
                    const int64_t place = sequence_at(call.layout, b).first_chunk * int64_t(CHUNK_TOKENS) + position;
                    const A depth_weight = alpha ? alpha[b * depths + k] : A(1);
                    const auto share = broadcast<Lanes<A>>(depth_weight * betas[place]);
                    const A* grad = grad_attention + b * d;
                    for_lanes(0, d, [&](int64_t j, auto n) {
                        store(row + j, multiply_add(load(grad + j, n), share, load(row + j, n)), n);
                    });
                    of_weight += depth_weight * grad_logits[place];
                }
                const auto share = broadcast<Lanes<A>>(of_weight);
                T* out = grad_states[k] + (group.start + position) * d;
                for_lanes(0, d, [&](int64_t j, auto n) {
                    store(out + j, multiply_add(load(weight + j, n), share, load(row + j, n)), n);
                });
            }
        }
    }
};

template <class T>
void run_views_backward(const ViewsBackward& call) {
    using A = arithmetic<T>;
    const Layout& layout = call.layout;
    const int64_t d = call.features, depths = call.depths, chunks = layout.num_chunks;
    const bool shared = layout.num_groups != layout.num_sequences;
    const int64_t numbers = 2 * depths * chunks * CHUNK_TOKENS * d;
    const int threads = threads_for(numbers, chunks, call.threads);
    const Scratch<A> rows(threads * 4 * d), per_token(shared ? 2 * chunks * CHUNK_TOKENS : 0);
    const Scratch<A> grad_alpha(chunks * depths), grad_weight(chunks * d);
    ScanBackward<T> scan{call, {}, {}, static_cast<const A*>(call.alpha), static_cast<const A*>(call.weight),
                         static_cast<const A*>(call.grad_attention), static_cast<const A*>(call.attention),
                         static_cast<const A*>(call.log_sum_exp), static_cast<const A*>(call.bias)[0], shared, false,
                         per_token.data(), per_token.row(1, chunks * CHUNK_TOKENS), grad_alpha.data(),
                         grad_weight.data()};
    for (int64_t k = 0; k < depths; ++k) {
        scan.states[k] = static_cast<const T*>(call.states[k]);
        scan.grad_states[k] = static_cast<T*>(call.grad_states[k]);
    }
    scan.streaming = depths * layout.num_tokens * d * int64_t(sizeof(T)) >= STREAMED_BYTES && d % LANES == 0;
    for (int64_t k = 0; k < depths; ++k) scan.streaming = scan.streaming && streamable(scan.grad_states[k]);
    with_depths(depths, [&](auto known) {
        parallel_for(chunks, threads, [&](int64_t chunk, int thread) {
            scan.chunk(known, chunk, rows.row(thread, 4 * d));
        });
    });
    if (shared) {
        // Groups are the prompts, then a response each, which has its gradient already.
        const int64_t prompts = layout.num_groups - layout.num_sequences, pieces = layout.num_group_chunks;
        parallel_for(pieces, threads, [&](int64_t piece, int thread) {
            if (layout.group_chunks[piece] >= prompts) return;
            const Group group = group_at(layout, layout.group_chunks[piece]);
            const int64_t begin = (piece - group.first_chunk) * CHUNK_TOKENS;
            const int64_t end = smaller(begin + CHUNK_TOKENS, group.stop - group.start);
            scan.prompt_chunk(group, begin, end, rows.row(thread, 4 * d));
        });
    } else {
        zero_padding<T>(layout, call.grad_states, depths, d, threads);
    }
    sum_rows(grad_weight.data(), chunks, d, static_cast<A*>(call.grad_weight), call.threads);
    for (int64_t b = 0; call.grad_alpha && b < layout.num_sequences; ++b) {
        A* out = static_cast<A*>(call.grad_alpha) + b * depths;
        fill_zero(out, depths);
        const Sequence s = sequence_at(layout, b);
        for (int64_t c = s.first_chunk; c < s.first_chunk + chunks_of(s); ++c)
            for (int64_t k = 0; k < depths; ++k) out[k] += grad_alpha.data()[c * depths + k];
    }
}

template <class T>
void run_spread_means(const SpreadMeans& call) {
    using A = arithmetic<T>;
    const Layout& layout = call.layout;
    const int64_t d = call.features;
    T* out = static_cast<T*>(call.grad_hidden);
    const int threads = threads_for(layout.num_tokens * d, layout.num_group_chunks, call.threads);
    const Scratch<A> scratch(threads * 2 * d);
    parallel_for(layout.num_group_chunks, threads, [&](int64_t piece, int thread) {
        const Group group = group_at(layout, layout.group_chunks[piece]);
        const int64_t begin = group.start + (piece - group.first_chunk) * CHUNK_TOKENS;
        const int64_t end = smaller(begin + CHUNK_TOKENS, group.stop);
        // All prompt tokens of a chunk have one gradient, and so have all response tokens.
        A* rows[] = {scratch.row(thread, 2 * d), scratch.row(thread, 2 * d) + d};
        fill_zero(rows[0], 2 * d);
        for (int64_t b = group.first_reader; b < group.first_reader + group.readers; ++b) {
            const Sequence s = sequence_at(layout, b);
            const auto add = [&](A* row, const real* grads, int64_t count) {
                if (!grads || !count) return;
                const A* grad = static_cast<const A*>(grads) + b * d;
                const auto n_tokens = broadcast<Lanes<A>>(A(count));
                for_lanes(0, d, [&](int64_t j, auto n) {
                    store(row + j, load(row + j, n) + load(grad + j, n) / n_tokens, n);
                });
            };
            add(rows[0], call.prompt, s.prompts);
            add(rows[1], call.response, s.responses);
            for (A* row : rows) add(row, call.all, s.prompts + s.responses);
        }
        for (int64_t t = begin; t < end; ++t) {
            const A* row = rows[layout.roles[t] == RESPONSE];
            for_lanes(0, d, [&](int64_t j, auto n) { store(out + t * d + j, load(row + j, n), n); });
        }
    });
    void* const outputs[] = {call.grad_hidden};
    zero_padding<T>(layout, outputs, 1, d, threads);
}

}  // namespace

void views_backward(const ViewsBackward& call) {
    with_dtype(call.dtype, [&](auto stored) { run_views_backward<typename decltype(stored)::type>(call); });
}

void spread_means(const SpreadMeans& call) {
    with_dtype(call.dtype, [&](auto stored) { run_spread_means<typename decltype(stored)::type>(call); });
}

}  // namespace adajudge::ADAJUDGE_LEVEL
