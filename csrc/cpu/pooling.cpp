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
constexpr int MEAN_AHEAD = 1024;       // bytes of each of them that are asked for before they are needed
constexpr int64_t COMBINED = 512;      // features that a thread combines at once

// A softmax's largest logit, to subtract: 0 where all of them so far are -inf.
template <class A>
A finite(A top) {
    return top == -INFINITY ? A(0) : top;
}

// What the views are made of.
template <class A>
struct ViewSums {
    A *weighted, *plain;   // of exp(logit - top) h, and of h over response tokens; null where no mean is wanted
    A top = -INFINITY;     // the largest logit
    double total = 0;      // of exp(logit - top): of one number a token, fp64 costs nothing

    void clear(int64_t features) {
        top = -INFINITY;
        total = 0;
        fill_zero(weighted, features);
        if (plain) fill_zero(plain, features);
    }

    ViewSums from(int64_t feature) const { return {weighted + feature, plain ? plain + feature : nullptr, top, total}; }

    // Another's tokens join these.
    void take(const ViewSums& other, int64_t features) {
        const A before = top;
        top = other.top <= top ? top : other.top;  // NaN comes through
        const A scale = exp_of_negative(before - finite(top)), share = exp_of_negative(other.top - finite(top));
        total = total * scale + other.total * share;
        const auto scales = broadcast<Lanes<A>>(scale), shares = broadcast<Lanes<A>>(share);
        for_lanes(0, features, [&](int64_t j, auto n) {
            store(weighted + j, multiply_add(load(weighted + j, n), scales, load(other.weighted + j, n) * shares), n);
        });
        if (plain) add_row(plain, other.plain, features);
    }
};

template <class T>
struct Scan {
    using A = arithmetic<T>;
    const Views& call;
    const T* states[MAX_DEPTHS];
    const A *alpha, *weight;
    A bias;

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

    // Adds the tokens at begin..end, in tiles of one role, so that a NaN in a prompt reaches no mean over responses. Rows are
    // summed by tile, tiles by chunk, chunks by run: errors of long sums of numbers of one sign grow with each sum's length.
    template <class Known>
    void add_tokens(Known known, const Chunk& c, int64_t begin, int64_t end, A* tile, ViewSums<A>& to) const {
        const int64_t d = call.features, width = parts(d, LANES) * LANES;
        const A one = 1;
        const A* depth_weights = alpha ? alpha + c.sequence_index * call.depths : &one;
        A logits[TILE];
        int held = 0;
        int8_t held_role = PADDING;
        int64_t position = begin;
        const auto flush = [&] {
            if (!held) return;
            const A before = to.top;
            for (int r = 0; r < held; ++r) to.top = logits[r] <= to.top ? to.top : logits[r];  // NaN comes through
            // p = exp(logits - top), and the scale of what came before in the lane after them.
            static_assert(TILE < LANES);
            A p[LANES] = {};
            for (int r = 0; r < held; ++r) p[r] = logits[r] - finite(to.top);
            p[TILE] = before - finite(to.top);
            store_pack(p, exp_of_negative(load_pack<Lanes<A>>(p)));
            const A scale = p[TILE];
            to.total *= scale;
            for (int r = 0; r < held; ++r) to.total += p[r];
            A* plain = held_role == RESPONSE ? to.plain : nullptr;
            if (held == TILE) {
                const bool another = c.end - position >= TILE;  // less would be asked for in vain
                const int64_t next = another ? c.sequence.slot(position) * d + AHEAD / int64_t(sizeof(T)) : 0;
                add<TILE>(to.weighted, plain, scale, p, tile, width, next);
            } else {
                for (int r = 0; r < held; ++r) add<1>(to.weighted, plain, r ? A(1) : scale, p + r, tile + r * width, width);
            }
            held = 0;
        };
        for (; position < end; ++position) {
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
        flush();
    }
};

template <class T>
void run_views(const Views& call) {
    using A = arithmetic<T>;
    const int64_t d = call.features, chunks = call.layout.num_chunks, tile = TILE * parts(d, LANES) * LANES;
    const int threads = threads_for(call.depths * chunks * CHUNK_TOKENS * d, chunks, call.threads);
    const Scratch<A> room(threads * (tile + 2 * d)), rows(2 * chunks * d);
    const Scratch<ViewSums<A>> sums(chunks);
    const auto plain = [&](A* row) { return call.alpha ? row : nullptr; };
    for (int64_t c = 0; c < chunks; ++c) *sums.row(c, 1) = {rows.row(c, d), plain(rows.row(chunks + c, d))};
    Scan<T> scan{call, {}, static_cast<const A*>(call.alpha), static_cast<const A*>(call.weight),
                 static_cast<const A*>(call.bias)[0]};
    for (int64_t k = 0; k < call.depths; ++k) scan.states[k] = static_cast<const T*>(call.states[k]);
    const Runs runs(call.layout, threads);
    with_depths<A>(call.depths, [&](auto known) {
        parallel_for(chunks, threads, [&](int64_t chunk, int thread) {
            A *const own = room.row(thread, tile + 2 * d), *const row = own + tile;
            runs.scan(chunk, sums.data(), {row, plain(row + d)}, d,
                      [&](const Chunk& c, int64_t begin, int64_t end, ViewSums<A>& to) {
                          scan.add_tokens(known, c, begin, end, own, to);
                      });
        });
    });
    const int64_t blocks = parts(d, COMBINED), pieces = call.layout.num_sequences * blocks;
    parallel_for(pieces, threads_for(2 * chunks / RUN * d, pieces, call.threads), [&](int64_t piece, int) {
        const int64_t b = piece / blocks, begin = piece % blocks * COMBINED, end = smaller(begin + COMBINED, d);
        const Sequence s = sequence_at(call.layout, b);
        A of_run[2][COMBINED];
        A* attention = static_cast<A*>(call.attention) + b * d + begin;
        A* mean = call.alpha ? static_cast<A*>(call.mean) + b * d + begin : nullptr;
        ViewSums<A> whole{attention, mean};
        runs.combine(s, sums.data(), begin, end, {of_run[0], plain(of_run[1])}, whole);
        const auto total = broadcast<Lanes<A>>(A(whole.total)), count = broadcast<Lanes<A>>(A(s.responses));
        for_lanes(0, end - begin, [&](int64_t j, auto n) {
            store(attention + j, load(attention + j, n) / total, n);
            if (mean) store(mean + j, load(mean + j, n) / count, n);
        });
        if (!begin) static_cast<A*>(call.log_sum_exp)[b] = whole.top + static_cast<A>(std::log(whole.total));
    });
}

// What the means are made of: sums over prompt tokens and over response tokens; null where nobody wants them.
template <class A>
struct RoleSums {
    A* rows[2];

    void clear(int64_t features) {
        for (A* row : rows)
            if (row) fill_zero(row, features);
    }

    RoleSums from(int64_t feature) const {
        return {rows[0] ? rows[0] + feature : nullptr, rows[1] ? rows[1] + feature : nullptr};
    }

    void take(const RoleSums& other, int64_t features) {
        for (int part = 0; part < 2; ++part)
            if (rows[part]) add_row(rows[part], other.rows[part], features);
    }
};

// Adds the tokens at begin..end, some rows at once.
template <class T, class A>
void add_tokens(const Means& call, const Chunk& c, int64_t begin, int64_t end, RoleSums<A>& to) {
    const int64_t d = call.features;
    const T* rows[2][TOGETHER];
    int held[2] = {};
    const auto flush = [&](int part) {
        A* row = to.rows[part];
        if (held[part] == TOGETHER) {
            const T* from[TOGETHER];
            for (int r = 0; r < TOGETHER; ++r) from[r] = rows[part][r];
            const auto ahead = [=](int64_t j) {  // in these rows or the next ones
                if (sizeof(T) == sizeof(A)) return;  // the processor's own foresight does better
                const int64_t there = j + MEAN_AHEAD / int64_t(sizeof(T)), at = there < d ? there : there + (TOGETHER - 1) * d;
                for (int r = 0; r < TOGETHER; ++r) __builtin_prefetch(from[r] + at, 0, READ_ONCE);
            };
            for_lines<T>(0, d, ahead, [=](int64_t j, auto n) {
                Lanes<A> totals[2] = {load(from[0] + j, n), load(from[1] + j, n)};
                for (int r = 2; r < TOGETHER; ++r) totals[r % 2] += load(from[r] + j, n);
                store(row + j, load(row + j, n) + (totals[0] + totals[1]), n);
            });
        } else {
            for (int r = 0; r < held[part]; ++r) add_row(row, rows[part][r], d);
        }
        held[part] = 0;
    };
    for (int64_t position = begin; position < end; ++position) {
        const int64_t slot = c.sequence.slot(position);
        const int part = call.layout.roles[slot] == RESPONSE;
        if (!to.rows[part]) continue;
        rows[part][held[part]++] = static_cast<const T*>(call.hidden) + slot * d;
        if (held[part] == TOGETHER) flush(part);
    }
    flush(0);
    flush(1);
}

template <class T>
void run_means(const Means& call) {
    using A = arithmetic<T>;
    const Layout& layout = call.layout;
    const int64_t d = call.features, chunks = layout.num_chunks;
    const auto wanted = [&](A* prompt, A* response) -> RoleSums<A> {
        return {call.prompt || call.all ? prompt : nullptr, call.response || call.all ? response : nullptr};
    };
    const int threads = threads_for(chunks * CHUNK_TOKENS * d, chunks, call.threads);
    const Scratch<A> room(threads * 2 * d), rows(2 * chunks * d);
    const Scratch<RoleSums<A>> sums(chunks);
    for (int64_t c = 0; c < chunks; ++c) *sums.row(c, 1) = wanted(rows.row(c, d), rows.row(chunks + c, d));
    const Runs runs(layout, threads);
    parallel_for(chunks, threads, [&](int64_t chunk, int thread) {
        runs.scan(chunk, sums.data(), wanted(room.row(2 * thread, d), room.row(2 * thread + 1, d)), d,
                  [&](const Chunk& c, int64_t begin, int64_t end, RoleSums<A>& to) { add_tokens<T>(call, c, begin, end, to); });
    });
    const int64_t blocks = parts(d, COMBINED), pieces = layout.num_sequences * blocks;
    parallel_for(pieces, threads_for(2 * chunks / RUN * d, pieces, call.threads), [&](int64_t piece, int) {
        const int64_t b = piece / blocks, begin = piece % blocks * COMBINED, width = smaller(COMBINED, d - begin);
        const Sequence s = sequence_at(layout, b);
        A total[2][COMBINED] = {}, of_run[2][COMBINED];
        RoleSums<A> whole = wanted(total[0], total[1]);
        runs.combine(s, sums.data(), begin, begin + width, wanted(of_run[0], of_run[1]), whole);
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
