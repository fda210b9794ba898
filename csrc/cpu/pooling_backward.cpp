// Pooling backward: one pass over the states, chunk by chunk, which writes each token's gradient at once. Prompt tokens
// that several sequences read get theirs in a second pass, summed over the readers in order.
#include "pooling.h"

#include <utility>

namespace adajudge::ADAJUDGE_LEVEL {
namespace {

constexpr int64_t STREAMED_BYTES = 32 << 20;  // of gradients: more than caches keep until somebody reads them
constexpr int TILE = 4;                       // tokens that are read together
constexpr int64_t BLOCK = 512;                // features at a time: what tokens share of them stays in the first cache
static_assert(ROW_SEGMENT % BLOCK == 0);      // logits are summed as in the forward: beta is what it was there

template <class T>
struct ScanBackward {
    using A = arithmetic<T>;
    const ViewsBackward& call;
    const T* states[MAX_DEPTHS];
    T* grad_states[MAX_DEPTHS];
    const A *alpha, *weight, *grad_attention, *attention, *log_sum_exp;
    A bias;
    bool shared;             // whether sequences share prompts: their tokens' gradients are left to `prompt_chunk`
    A *betas, *grad_logits;  // [N * CHUNK_TOKENS] where prompts are shared
    A *grad_alpha_parts;     // [N, K]
    A *grad_weight_parts;    // [N, d]

    // What a chunk's tokens share: alpha [K], g_A and z_A; what the last and the mean view say of a token's gradient: of a
    // prompt token nothing, of a response token g_M / n, of the last one g_L besides; the sums of dalpha [K] and dw.
    struct Work {
        const A *depth_weights, *grad, *pooled;
        A *prompt, *response, *last;
        Lanes<A>* grad_alpha;
        A* grad_weight;
    };
    static constexpr int ROWS = 3;  // of them a thread's own

    // A token: what its gradient starts from (a row of `Work`), whether it gets it here (else in `prompt_chunk`, from what is kept
    // at `place`), and what reading it gives: w . h and g_A . (h - z_A), with h = sum_k alpha_k H_k; then beta and dlogit.
    struct Token {
        int64_t slot, place;
        const A* base;
        bool own;
        Lanes<A> logit, segment, dot;  // of the features so far; of those of the segment they are in
        A beta, grad_logit;
    };

    // Features begin..end of two tokens: READ reads the one, GIVE gives the other one, which has been read before, its gradient,
    // with STREAM past the caches; both at once, so that memory reads and writes at once:
    // g = base + beta g_A + dlogit w; dH_k = alpha_k g, dalpha_k += g . H_k, dw += dlogit (h - z_A):
    // the dlogit of a sequence sum to zero, and so a mean of its states need not cancel.
    template <bool READ, bool GIVE, bool STREAM, class Known>
    void step(Known, const Work& work, Token& token, const Token& before, int64_t begin, int64_t end) const {
        const int64_t d = call.features, depths = Known::known ? Known::known : call.depths;
        const T *rows[Known::most], *rows_before[Known::most];
        T* grad_rows[Known::most];
        A a[Known::most];
        Lanes<A> dots[Known::most];
        for (int k = 0; k < depths; ++k) {
            if (READ) rows[k] = states[k] + token.slot * d;
            if (GIVE) rows_before[k] = states[k] + before.slot * d, grad_rows[k] = grad_states[k] + before.slot * d;
            a[k] = work.depth_weights[k];
            dots[k] = broadcast<Lanes<A>>(A(0));
        }
        const A *const w = weight, *const grad = work.grad, *const pooled = work.pooled, *const base = before.base;
        A* const grad_weight = work.grad_weight;
        const A beta = before.beta, grad_logit = before.grad_logit;
        const bool own = before.own;
        auto logit = token.segment, dot = broadcast<Lanes<A>>(A(0));
        const int64_t further = end < d ? BLOCK : TILE * d - begin;  // its next block, or its place in the next tile
        const auto ahead = [&](int64_t j) {
            for (int k = 0; READ && k < depths; ++k) __builtin_prefetch(rows[k] + j + further);
        };
        for_whole_lines<T>(begin, end, ahead, [&](int64_t j, auto n) {
            using P = decltype(load(w + j, n));
            const auto all = [](A x) { return broadcast<P>(x); };
            const P of_weight = load(w + j, n), of_grad = load(grad + j, n), of_pooled = load(pooled + j, n);
            if constexpr (READ) {
                P h = load(rows[0] + j, n) * all(a[0]);
                for (int k = 1; k < depths; ++k) h = multiply_add(load(rows[k] + j, n), all(a[k]), h);
                logit = multiply_add(h, of_weight, logit);
                dot = multiply_add(h - of_pooled, of_grad, dot);
            }
            if constexpr (GIVE) {
                const P of_views = multiply_add(of_grad, all(beta), load(base + j, n));
                const P g = multiply_add(of_weight, all(grad_logit), of_views);
                P state = load(rows_before[0] + j, n), h = state * all(a[0]);
                dots[0] = multiply_add(g, state, dots[0]);
                for (int k = 1; k < depths; ++k) {
                    state = load(rows_before[k] + j, n);
                    h = multiply_add(state, all(a[k]), h);
                    dots[k] = multiply_add(g, state, dots[k]);
                }
                store(grad_weight + j, multiply_add(h - of_pooled, all(grad_logit), load(grad_weight + j, n)), n);
                for (int k = 0; own && k < depths; ++k) {
                    if constexpr (STREAM) stream(grad_rows[k] + j, g * all(a[k]), n);
                    else store(grad_rows[k] + j, g * all(a[k]), n);
                }
            }
        });
        const bool ends = end == d || end % ROW_SEGMENT == 0;
        if (ends) token.logit += logit;
        token.segment = ends ? broadcast<Lanes<A>>(A(0)) : logit;
        token.dot += dot;
        for (int k = 0; GIVE && k < depths; ++k) work.grad_alpha[k] += dots[k];
    }

    template <bool STREAM, class Known>
    void chunk(Known known, int64_t index, A* rows) const {
        const int64_t d = call.features, depths = call.depths;
        const Chunk c = chunk_at(call.layout, index);
        const int64_t b = c.sequence_index;
        const auto zero = broadcast<Lanes<A>>(A(0));
        const A one = 1;
        Lanes<A> grad_alpha[MAX_DEPTHS];
        for (auto& sum : grad_alpha) sum = zero;
        const Work work{alpha ? alpha + b * depths : &one, grad_attention + b * d, attention + b * d,
                        rows, rows + d, rows + 2 * d, grad_alpha, grad_weight_parts + index * d};
        fill_zero(rows, ROWS * d);
        fill_zero(work.grad_weight, d);
        if (alpha) {
            const A* grad_mean = static_cast<const A*>(call.grad_mean) + b * d;
            const A* grad_last = static_cast<const A*>(call.grad_last) + b * d;
            const auto count = broadcast<Lanes<A>>(A(c.sequence.responses));
            for_lanes(0, d, [&](int64_t j, auto n) {
                const Lanes<A> mean = load(grad_mean + j, n) / count;
                store(work.response + j, mean, n);
                store(work.last + j, mean + load(grad_last + j, n), n);
            });
        }
        Token tiles[2][TILE] = {}, *now = tiles[0], *before = tiles[1];
        int held = 0, given = 0;  // of the tile that is read, and of the tile before it
        const auto work_on_tile = [&] {
            for (int64_t begin = 0; begin < d; begin += BLOCK) {
                const int64_t end = smaller(begin + BLOCK, d);
                for (int r = 0; r < larger(held, given); ++r) {
                    if (r >= given) step<true, false, false>(known, work, now[r], before[r], begin, end);
                    else if (r >= held) step<false, true, STREAM>(known, work, now[r], before[r], begin, end);
                    else step<true, true, STREAM>(known, work, now[r], before[r], begin, end);
                }
            }
            for (int r = 0; r < held; ++r) {
                Token& token = now[r];
                token.beta = exp_of_negative(sum<A>(token.logit) + bias - log_sum_exp[b]);
                token.grad_logit = token.beta * sum<A>(token.dot);
                if (token.own) continue;
                betas[token.place] = token.beta;
                grad_logits[token.place] = token.grad_logit;
            }
            given = held;
            held = 0;
            std::swap(now, before);
        };
        for (int64_t position = c.begin; position < c.end; ++position) {
            const int64_t slot = c.sequence.slot(position);
            const bool own = !shared || position >= c.sequence.first(), response = call.layout.roles[slot] == RESPONSE;
            if (call.response_only && !response) {  // nobody has read it
                for (int64_t k = 0; own && k < depths; ++k) fill_zero(grad_states[k] + slot * d, d);
                continue;
            }
            if (held == TILE) work_on_tile();
            const A* base = slot == c.sequence.last_response ? work.last : response ? work.response : work.prompt;
            now[held++] = {slot, index * CHUNK_TOKENS + position - c.begin, base, own, zero, zero, zero, 0, 0};
        }
        work_on_tile();
        work_on_tile();  // nothing is left to read: the last tokens' gradients
        for (int64_t k = 0; k < depths; ++k) grad_alpha_parts[index * depths + k] = sum<A>(grad_alpha[k]);
        if (STREAM) streamed();
    }

    // dH_k = sum over readers of alpha_k (beta g_A + dlogit w), for a chunk of a prompt's tokens; zeros if the view reads none.
    void prompt_chunk(const Group& group, int64_t begin, int64_t end, A* row) const {
        const int64_t d = call.features, depths = call.depths;
        if (call.response_only || !group.readers) {
            for (int64_t k = 0; k < depths; ++k) fill_zero(grad_states[k] + (group.start + begin) * d, (end - begin) * d);
            return;
        }
        for (int64_t position = begin; position < end; ++position) {
            for (int64_t k = 0; k < depths; ++k) {
                fill_zero(row, d);
                A of_weight = 0;
                for (int64_t b = group.first_reader; b < group.first_reader + group.readers; ++b) {
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
    const Scratch<A> rows(threads * ScanBackward<T>::ROWS * d), per_token(shared ? 2 * chunks * CHUNK_TOKENS : 0);
    const Scratch<A> grad_alpha(chunks * depths), grad_weight(chunks * d);
    ScanBackward<T> scan{call, {}, {}, static_cast<const A*>(call.alpha), static_cast<const A*>(call.weight),
                         static_cast<const A*>(call.grad_attention), static_cast<const A*>(call.attention),
                         static_cast<const A*>(call.log_sum_exp), static_cast<const A*>(call.bias)[0], shared,
                         per_token.data(), per_token.row(1, chunks * CHUNK_TOKENS), grad_alpha.data(),
                         grad_weight.data()};
    for (int64_t k = 0; k < depths; ++k) {
        scan.states[k] = static_cast<const T*>(call.states[k]);
        scan.grad_states[k] = static_cast<T*>(call.grad_states[k]);
    }
    bool streaming = depths * layout.num_tokens * d * int64_t(sizeof(T)) >= STREAMED_BYTES && d * sizeof(T) % CACHE_LINE == 0;
    for (int64_t k = 0; k < depths; ++k) streaming = streaming && streamable(scan.grad_states[k]);
    with_depths<A>(depths, [&](auto known) {
        parallel_for(chunks, threads, [&](int64_t chunk, int thread) {
            A* own = rows.row(thread, ScanBackward<T>::ROWS * d);
            streaming ? scan.template chunk<true>(known, chunk, own) : scan.template chunk<false>(known, chunk, own);
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
            scan.prompt_chunk(group, begin, end, rows.row(thread, ScanBackward<T>::ROWS * d));
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
