// Pooling forward: one scan over the states, run by run of chunks, several views; then each sequence's runs in order.
#include "pooling.h"

#include <cmath>

namespace adajudge::ADAJUDGE_LEVEL {
namespace {

constexpr int TILE = 8;                // tokens whose rows are added to a view together, while they are in the cache
constexpr int AHEAD = 2048;            // bytes of a state that are asked for before they are needed
constexpr int READ_ONCE = 0;           // what is asked for need not stay in the caches
constexpr int ASKED = 2;               // cache lines asked for with every LANES features of a tile: what memory gives meanwhile
constexpr int TOGETHER = 8;            // rows that a mean adds up before it touches memory
constexpr int64_t COMBINED = 512;      // features that a thread combines at once

// A softmax's largest logit, to subtract: 0 where all of them so far are -inf.
template <class A>
A finite(A top) {
    return top == -INFINITY ? A(0) : top;
}

template <class T>
struct Scan {
    using A = arithmetic<T>;
    const Views& call;
    const T* states[MAX_DEPTHS];
    const A *alpha, *weight;
    A bias;
    // Of each run, at its first chunk's number (the places between stay empty): the sum over its response tokens and the
    // attention-weighted sum [N, d], the largest logit and the sum of exp(logit - largest) [N].
    A *sums, *weighted, *tops, *totals;

    // h = sum_k alpha_k H_k of one token, and w . h.
    template <class Known>
    A mix(Known, int64_t slot, const A* depth_weights, A* h) const {
        const int64_t d = call.features, depths = Known::known ? Known::known : call.depths;
        const T* rows[Known::most];
        Lanes<A> a[Known::most];
        for (int k = 0; k < depths; ++k) {
            rows[k] = states[k] + slot * d;
            a[k] = broadcast<Lanes<A>>(depth_weights[k]);
        }
        const A* w = weight;
        auto logit = broadcast<Lanes<A>>(A(0));
        for_segments(d, [&](int64_t begin, int64_t end) {
            auto part = broadcast<Lanes<A>>(A(0));
            const auto ahead = [&](int64_t j) {  // in this row or the next
                for (int k = 0; k < depths; ++k) __builtin_prefetch(rows[k] + j + AHEAD / sizeof(T), 0, READ_ONCE);
            };
            for_lines<T>(begin, end, ahead, [&](int64_t j, auto n) {
                Lanes<A> x = load(rows[0] + j, n) * a[0];
                for (int k = 1; k < depths; ++k) x = multiply_add(load(rows[k] + j, n), a[k], x);
                part = multiply_add(x, load(w + j, n), part);
                store(h + j, x, All{});  // rows of h are whole lanes wide
            });
            logit += part;
        });
        return sum<A>(logit);
    }

    // weighted = weighted * scale + sum_r p_r h_r; with SUM: sums += sum_r h_r. A tile's rows come from the caches; that memory
    // does not rest meanwhile, the states are asked for from the offset `next` on, of each a line in turn; for 0 none.
    template <int R, bool SUM>
    void add(A* weighted_row, A* sum_row, A scale, const A* p, const A* tile, int64_t width, int64_t next) const {
        const auto scales = broadcast<Lanes<A>>(scale);
        Lanes<A> weights[R];
        for (int r = 0; r < R; ++r) weights[r] = broadcast<Lanes<A>>(p[r]);
        int k = 0;
        for_lanes(0, call.features, [&](int64_t j, auto n) {
            if (R == TILE && next) {
                for (int line = 0; line < ASKED; ++line) {
                    __builtin_prefetch(states[k] + next, 0, READ_ONCE);
                    if (++k < call.depths) continue;
                    k = 0;
                    next += CACHE_LINE / sizeof(T);
                }
            }
            Lanes<A> h = load(tile + j, All{}), x = h * weights[0], totals[2] = {h};
            for (int r = 1; r < R; ++r) {
                h = load(tile + r * width + j, All{});
                x = multiply_add(h, weights[r], x);
                totals[r % 2] = r == 1 ? h : totals[r % 2] + h;
            }
            store(weighted_row + j, multiply_add(load(weighted_row + j, n), scales, x), n);
            if constexpr (SUM) store(sum_row + j, load(sum_row + j, n) + (R > 1 ? totals[0] + totals[1] : h), n);
        });
    }

    template <int R>
    void add(A* weighted_row, A* sum_row, A scale, const A* p, const A* tile, int64_t width, int64_t next = 0) const {
        if (sum_row) return add<R, true>(weighted_row, sum_row, scale, p, tile, width, next);
        add<R, false>(weighted_row, nullptr, scale, p, tile, width, next);
    }

    // Tokens of a run in tiles of one role, so that a NaN in a prompt reaches no mean over responses. Rows are summed by
    // tile, tiles by chunk, chunks by run: errors of long sums of numbers of one sign grow with each sum's length.
    template <class Known>
    void run(Known known, int64_t index, A* tile) const {
        const int64_t d = call.features, width = parts(d, LANES) * LANES;
        const Chunk c = run_at(call.layout, index);
        const A one = 1;
        const A* depth_weights = alpha ? alpha + c.sequence_index * call.depths : &one;
        A *const run_weighted = weighted + index * d, *const run_sum = alpha ? sums + index * d : nullptr;
        A *const weighted_row = tile + TILE * width, *const weighted_rest = weighted_row + width;
        A *const sum_row = alpha ? weighted_rest + width : nullptr, *const sum_rest = weighted_rest + 2 * width;
        fill_zero(run_weighted, d);
        if (run_sum) fill_zero(run_sum, d);
        fill_zero(weighted_row, 4 * width);
        A top = -INFINITY, run_top = top, logits[TILE];
        double total = 0;  // of one number a token: fp64 costs nothing
        int held = 0;
        int8_t held_role = PADDING;
        int64_t position = c.begin;
        const auto flush = [&] {
            if (!held) return;
            const A before = top;
            for (int r = 0; r < held; ++r) top = logits[r] <= top ? top : logits[r];  // NaN comes through
            // p = exp(logits - top), and the scale of what came before in the lane after them.
            static_assert(TILE < LANES);
            A p[LANES] = {};
            for (int r = 0; r < held; ++r) p[r] = logits[r] - finite(top);
            p[TILE] = before - finite(top);
            store_pack(p, exp_of_negative(load_pack<Lanes<A>>(p)));
            const A scale = p[TILE];
            total *= scale;
            for (int r = 0; r < held; ++r) total += p[r];
            A* to = held_role == RESPONSE ? sum_row : nullptr;
            if (held == TILE) {
                const bool another = c.end - position >= TILE;  // less would be asked for in vain
                const int64_t next = another ? c.sequence.slot(position) * d + AHEAD / int64_t(sizeof(T)) : 0;
                add<TILE>(weighted_row, to, scale, p, tile, width, next);
            } else {
                for (int r = 0; r < held; ++r) add<1>(weighted_row, to, r ? A(1) : scale, p + r, tile + r * width, width);
            }
            held = 0;
        };
        const auto end_chunk = [&] {
            flush();
            fold_row(run_weighted, weighted_rest, weighted_row, exp_of_negative(run_top - finite(top)), d);
            if (run_sum) fold_row(run_sum, sum_rest, sum_row, A(1), d);
            run_top = top;
        };
        for (; position < c.end; ++position) {
            if (position > c.begin && (position - c.begin) % CHUNK_TOKENS == 0) end_chunk();
            const int64_t slot = c.sequence.slot(position);
            const int8_t role = call.layout.roles[slot];
            if (call.response_only && role != RESPONSE) continue;
            if (held == TILE || (held && role != held_role)) flush();
            A* h = tile + held * width;
            logits[held++] = mix(known, slot, depth_weights, h) + bias;
            held_role = role;
            if (alpha && slot == c.sequence.last_response)
                std::memcpy(static_cast<A*>(call.last) + c.sequence_index * d, h, static_cast<std::size_t>(d) * sizeof(A));
        }
        end_chunk();
        add_row(run_weighted, weighted_rest, d);
        if (run_sum) add_row(run_sum, sum_rest, d);
        tops[index] = top;
        totals[index] = static_cast<A>(total);
    }

    // The views of a sequence, from its runs: features begin..end.
    void combine(int64_t b, int64_t begin, int64_t end) const {
        const int64_t d = call.features;
        const Sequence s = sequence_at(call.layout, b);
        const int64_t first = s.first_chunk, stop = first + chunks_of(s);
        A top = -INFINITY;
        double total = 0;
        for (int64_t c = first; c < stop; c += RUN)
            if (totals[c] != 0) top = tops[c] <= top ? top : tops[c];
        for (int64_t c = first; c < stop; c += RUN)
            if (totals[c] != 0) total += totals[c] * exp_of_negative(tops[c] - top);
        A* attention = static_cast<A*>(call.attention) + b * d + begin;
        A* mean = alpha ? static_cast<A*>(call.mean) + b * d + begin : nullptr;
        fill_zero(attention, end - begin);
        if (mean) fill_zero(mean, end - begin);
        for (int64_t c = first; c < stop; c += RUN) {
            if (mean) add_row(mean, sums + c * d + begin, end - begin);
            if (totals[c] == 0) continue;  // nothing of it is in the view
            const auto share = broadcast<Lanes<A>>(exp_of_negative(tops[c] - top));
            const A* from = weighted + c * d + begin;
            for_lanes(0, end - begin, [&](int64_t j, auto n) {
                store(attention + j, multiply_add(load(from + j, n), share, load(attention + j, n)), n);
            });
        }
        const auto whole = broadcast<Lanes<A>>(A(total)), count = broadcast<Lanes<A>>(A(s.responses));
        for_lanes(0, end - begin, [&](int64_t j, auto n) {
            store(attention + j, load(attention + j, n) / whole, n);
            if (mean) store(mean + j, load(mean + j, n) / count, n);
        });
        if (!begin) static_cast<A*>(call.log_sum_exp)[b] = top + static_cast<A>(std::log(total));
    }
};

template <class T>
void run_views(const Views& call) {
    using A = arithmetic<T>;
    const int64_t d = call.features, chunks = call.layout.num_chunks, width = parts(d, LANES) * LANES;
    const int64_t numbers = call.depths * chunks * CHUNK_TOKENS * d;
    const int threads = threads_for(numbers, chunks, call.threads);
    const Scratch<A> tiles(threads * (TILE + 4) * width), partial((call.alpha ? 2 : 1) * chunks * d), scalars(2 * chunks);
    Scan<T> scan{call, {}, static_cast<const A*>(call.alpha), static_cast<const A*>(call.weight),
                 static_cast<const A*>(call.bias)[0], partial.row(1, chunks * d), partial.data(),
                 scalars.data(), scalars.row(1, chunks)};
    for (int64_t k = 0; k < call.depths; ++k) scan.states[k] = static_cast<const T*>(call.states[k]);
    with_depths(call.depths, [&](auto known) {
        parallel_for(chunks, threads, [&](int64_t chunk, int thread) {
            if (starts_run(call.layout, chunk)) scan.run(known, chunk, tiles.row(thread, (TILE + 4) * width));
        });
    });
    const int64_t blocks = parts(d, COMBINED), pieces = call.layout.num_sequences * blocks;
    parallel_for(pieces, threads_for(2 * chunks / RUN * d, pieces, call.threads), [&](int64_t piece, int) {
        const int64_t begin = piece % blocks * COMBINED;
        scan.combine(piece / blocks, begin, smaller(begin + COMBINED, d));
    });
}

template <class T>
void run_means(const Means& call) {
    using A = arithmetic<T>;
    const Layout& layout = call.layout;
    const int64_t d = call.features, chunks = layout.num_chunks;
    const bool wanted[] = {call.prompt || call.all, call.response || call.all};
    const Scratch<A> partial(2 * chunks * d);  // prompt sums, response sums
    A* sums[] = {partial.data(), partial.row(1, chunks * d)};
    const T* hidden = static_cast<const T*>(call.hidden);
    const int threads = threads_for(chunks * CHUNK_TOKENS * d, chunks, call.threads);
    const Scratch<A> of_chunks(threads * 4 * d);
    parallel_for(chunks, threads, [&](int64_t index, int thread) {
        if (!starts_run(layout, index)) return;
        const Chunk c = run_at(layout, index);
        A* of_chunk[] = {of_chunks.row(4 * thread, d), of_chunks.row(4 * thread + 1, d)};
        A* rest[] = {of_chunks.row(4 * thread + 2, d), of_chunks.row(4 * thread + 3, d)};
        fill_zero(of_chunk[0], 4 * d);
        for (int part = 0; part < 2; ++part)
            if (wanted[part]) fill_zero(sums[part] + index * d, d);
        const T* rows[2][TOGETHER];
        int held[2] = {};
        const auto flush = [&](int part) {
            if (!held[part]) return;
            A* to = of_chunk[part];
            for_lanes(0, d, [&](int64_t j, auto n) {
                auto total = load(rows[part][0] + j, n);
                for (int r = 1; r < held[part]; ++r) total += load(rows[part][r] + j, n);
                store(to + j, load(to + j, n) + total, n);
            });
            held[part] = 0;
        };
        const auto end_chunk = [&] {
            for (int part = 0; part < 2; ++part) {
                if (!wanted[part]) continue;
                flush(part);
                fold_row(sums[part] + index * d, rest[part], of_chunk[part], A(1), d);
            }
        };
        for (int64_t position = c.begin; position < c.end; ++position) {
            if (position > c.begin && (position - c.begin) % CHUNK_TOKENS == 0) end_chunk();
            const int64_t slot = c.sequence.slot(position);
            const int part = layout.roles[slot] == RESPONSE;
            if (!wanted[part]) continue;
            rows[part][held[part]++] = hidden + slot * d;
            if (held[part] == TOGETHER) flush(part);
        }
        end_chunk();
        for (int part = 0; part < 2; ++part)
            if (wanted[part]) add_row(sums[part] + index * d, rest[part], d);
    });
    const int64_t blocks = parts(d, COMBINED), pieces = layout.num_sequences * blocks;
    parallel_for(pieces, threads_for(2 * chunks / RUN * d, pieces, call.threads), [&](int64_t piece, int) {
        const int64_t b = piece / blocks, begin = piece % blocks * COMBINED, width = smaller(COMBINED, d - begin);
        const Sequence s = sequence_at(layout, b);
        A total[2][COMBINED] = {};
        for (int part = 0; part < 2; ++part)
            for (int64_t c = s.first_chunk; wanted[part] && c < s.first_chunk + chunks_of(s); c += RUN)
                add_row(total[part], sums[part] + c * d + begin, width);
        const auto write = [&](real* to, auto sum_of, int64_t count) {
            if (!to) return;
            A* row = static_cast<A*>(to) + b * d + begin;
            const auto n_tokens = broadcast<Lanes<A>>(A(larger(count, 1)));
            for_lanes(0, width, [&](int64_t j, auto n) { store(row + j, sum_of(j, n) / n_tokens, n); });
        };
        write(call.prompt, [&](int64_t j, auto n) { return load(total[0] + j, n); }, s.prompts);
        write(call.response, [&](int64_t j, auto n) { return load(total[1] + j, n); }, s.responses);
        write(call.all, [&](int64_t j, auto n) { return load(total[0] + j, n) + load(total[1] + j, n); },
              s.prompts + s.responses);
    });
}

template <class A>
void run_depth_weights(const DepthWeights& call) {
    const int64_t d = call.features, depths = call.depths;
    const A *weight = static_cast<const A*>(call.weight), *bias = static_cast<const A*>(call.bias);
    for (int64_t b = 0; b < call.num_sequences; ++b) {
        A* alpha = static_cast<A*>(call.alpha) + b * depths;
        A top = -INFINITY, total = 0;
        for (int64_t k = 0; k < depths; ++k) {
            alpha[k] = dot(static_cast<const A*>(call.context) + b * d, weight + k * d, d) + bias[k];
            top = alpha[k] <= top ? top : alpha[k];
        }
        for (int64_t k = 0; k < depths; ++k) total += alpha[k] = exp_of_negative(alpha[k] - top);
        for (int64_t k = 0; k < depths; ++k) alpha[k] /= total;
    }
}

}  // namespace

void views(const Views& call) {
    with_dtype(call.dtype, [&](auto stored) { run_views<typename decltype(stored)::type>(call); });
}

void means(const Means& call) {
    with_dtype(call.dtype, [&](auto stored) { run_means<typename decltype(stored)::type>(call); });
}

void depth_weights(const DepthWeights& call) {
    call.dtype == Dtype::float64 ? run_depth_weights<double>(call) : run_depth_weights<float>(call);
}

}  // namespace adajudge::ADAJUDGE_LEVEL
