// Attention inside sequences, forward: keys in blocks, with a running softmax; nothing of the size of the scores is kept.
//
// Lanes are queries. So scores and mixtures are the same product, of columns of lanes with a number that all of them share
// (of a key, of a value), the softmax is the same operation on all lanes, and no sum runs across lanes. A query's bits
// depend on the keys that it sees, counted from its sequence's first, and on nothing else, as long as values are finite: a
// value of its own range that comes later is multiplied by zero.
#include <cmath>
#include <limits>

#include "dtypes.h"
#include "rows.h"

namespace adajudge::ADAJUDGE_LEVEL {
namespace {

constexpr int KEYS = 64;                               // of a block
constexpr int COLUMNS = REGISTER_BYTES == 64 ? 2 : 1;  // of lanes, and
constexpr int ROWS = REGISTER_BYTES == 64 ? 8 : 4;     // shared numbers: what a product keeps in registers
constexpr int TILE = COLUMNS * LANES;                  // queries
constexpr int64_t HEADS = 4;                           // of queries that read a block of keys while it is in the cache

// A query sees the range [start0, stop0), then its own, [start1, stop1); positions run through both.
struct Ranges {
    int32_t start0, stop0, start1, stop1;

    int64_t before() const { return stop0 - start0; }
    int64_t length() const { return before() + stop1 - start1; }
    int64_t position(int64_t own_token) const { return own_token - start1 + before(); }
    int64_t slot(int64_t position) const { return position < before() ? start0 + position : start1 + position - before(); }
};

// out[r] = sum_i left[i] right[r * row + i * step], each sum in the order of i.
template <class A>
ALWAYS_INLINE void multiply(const A* left, const A* right, int64_t row, int64_t step, int64_t count,
                            Lanes<A> (&out)[ROWS][COLUMNS]) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
        for (int c = 0; c < COLUMNS; ++c) out[r][c] = broadcast<Lanes<A>>(A(0));
    for (int64_t i = 0; i < count; ++i) {
        Lanes<A> x[COLUMNS];
        for (int c = 0; c < COLUMNS; ++c) x[c] = load(left + i * TILE + c * LANES, All{});
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const auto y = broadcast<Lanes<A>>(right[r * row + i * step]);
            for (int c = 0; c < COLUMNS; ++c) out[r][c] = multiply_add(x[c], y, out[r][c]);
        }
    }
}

// Some rows of the query, of one head.
template <class A>
struct Tile {
    int64_t first, count, head;
    int64_t seen, whole;  // keys that some of them see, and all of them
    A *query, *mixed;     // [e, TILE], [width, TILE]
    A *tops, *totals;     // [TILE], of the softmax so far
};

template <class T>
struct Attend {
    using A = arithmetic<T>;
    const Attention& call;
    int64_t width;  // of a head, in whole ROWS

    int64_t token(int64_t row) const { return call.rows ? call.rows[row] : row; }

    // Numbers of scratch memory: of a tile, and of a piece.
    int64_t of_tile() const { return TILE * (call.head_size + width + 2); }
    int64_t of_piece() const {
        return 2 * KEYS * width + (KEYS + 1) * TILE + parts(CHUNK_TOKENS, TILE) * HEADS * of_tile();
    }

    // Queries first..stop of the heads from first_head on, HEADS at most, which share a head of the keys.
    void piece(const Ranges& ranges, int64_t first, int64_t stop, int64_t first_head, int64_t heads, A* memory) const {
        const int64_t key_head = first_head / (call.heads / call.key_heads);
        A *const keys = memory, *const values = keys + KEYS * width, *const scores = values + KEYS * width;
        A *const scales = scores + KEYS * TILE, *const of_tiles = scales + TILE;
        const int64_t per_head = parts(stop - first, TILE), tiles = per_head * heads;
        const auto tile_at = [&](int64_t t) {
            const int64_t begin = first + t % per_head * TILE, end = smaller(begin + TILE, stop);
            A *const query = of_tiles + t * of_tile(), *const mixed = query + TILE * call.head_size;
            A *const tops = mixed + TILE * width;
            Tile<A> tile{begin, end - begin, first_head + t / per_head, ranges.length(), ranges.length(),
                         query, mixed, tops, tops + TILE};
            if (call.causal) {
                tile.seen = ranges.position(token(end - 1)) + 1;
                tile.whole = ranges.position(token(begin)) + 1;
            }
            return tile;
        };
        for (int64_t t = 0; t < tiles; ++t) begin_tile(tile_at(t));
        const int64_t seen = tile_at(per_head - 1).seen;
        for (int64_t begin = 0; begin < seen; begin += KEYS) {
            const int64_t end = smaller(begin + KEYS, seen);
            gather(call.key, call.key_token, key_head * call.key_head, ranges, begin, end, keys);
            gather(call.value, call.value_token, key_head * call.value_head, ranges, begin, end, values);
            for (int64_t t = 0; t < tiles; ++t) {
                const Tile<A> tile = tile_at(t);
                const int64_t count = smaller(end, tile.seen) - begin;
                if (count <= 0) continue;
                score(tile, ranges, begin, count, keys, scores);
                weigh(tile, count, scores, scales);
                mix(tile, count, values, scores, scales);
            }
        }
        for (int64_t t = 0; t < tiles; ++t) end_tile(tile_at(t));
    }

    void begin_tile(const Tile<A>& tile) const {
        fill_zero(tile.query, TILE * call.head_size);
        fill_zero(tile.mixed, TILE * width);
        fill_zero(tile.totals, TILE);
        for (int i = 0; i < TILE; ++i) tile.tops[i] = std::numeric_limits<A>::lowest();  // -inf - -inf would be NaN
        for (int64_t i = 0; i < tile.count; ++i) {
            const T* row = static_cast<const T*>(call.query) + (tile.first + i) * call.query_token + tile.head * call.query_head;
            for_lanes(0, call.head_size, [&](int64_t j, auto n) {
                A held[LANES];
                store(held, load(row + j, n), All{});
                for (int64_t k = 0; k < smaller(LANES, call.head_size - j); ++k) tile.query[(j + k) * TILE + i] = held[k];
            });
        }
    }

    // Keys or values begin..end as [.., width], zero beyond a head's numbers and up to whole ROWS of them.
    void gather(const void* from, int64_t token_stride, int64_t offset, const Ranges& ranges, int64_t begin, int64_t end,
                A* to) const {
        if (width != call.head_size || (end - begin) % ROWS) fill_zero(to, KEYS * width);
        for (int64_t position = begin; position < end; ++position, to += width) {
            const T* row = static_cast<const T*>(from) + ranges.slot(position) * token_stride + offset;
            for_lanes(0, call.head_size, [&](int64_t j, auto n) { store(to + j, load(row + j, n), n); });
        }
    }

    // scores [count, TILE] = scale k . q, -inf where a query does not see the key.
    void score(const Tile<A>& tile, const Ranges& ranges, int64_t begin, int64_t count, const A* keys, A* scores) const {
        const auto scale = broadcast<Lanes<A>>(A(call.scale));
        for (int64_t key = 0; key < count; key += ROWS) {
            Lanes<A> found[ROWS][COLUMNS];
            multiply(tile.query, keys + key * width, width, 1, call.head_size, found);
            for (int r = 0; r < ROWS; ++r)
                for (int c = 0; c < COLUMNS; ++c) store(scores + (key + r) * TILE + c * LANES, found[r][c] * scale, All{});
        }
        if (begin + count <= tile.whole) return;
        for (int64_t i = 0; i < tile.count; ++i)
            for (int64_t key = larger(ranges.position(token(tile.first + i)) + 1 - begin, 0); key < count; ++key)
                scores[key * TILE + i] = -INFINITY;
    }

    // The softmax so far and these scores: exp(score - top) in their place, and what earlier sums are multiplied by.
    void weigh(const Tile<A>& tile, int64_t count, A* scores, A* scales) const {
        for (int c = 0; c < TILE; c += LANES) {
            const Lanes<A> before = load(tile.tops + c, All{});
            Lanes<A> top = before, total = broadcast<Lanes<A>>(A(0));
            for (int64_t key = 0; key < count; ++key) top = maximum(top, load(scores + key * TILE + c, All{}));
            for (int64_t key = 0; key < count; ++key) {
                const Lanes<A> p = exp_of_negative(load(scores + key * TILE + c, All{}) - top);
                total += p;
                store(scores + key * TILE + c, p, All{});
            }
            const Lanes<A> scale = exp_of_negative(before - top);
            store(tile.totals + c, multiply_add(load(tile.totals + c, All{}), scale, total), All{});
            store(tile.tops + c, top, All{});
            store(scales + c, scale, All{});
        }
    }

    // mixed = mixed * scale + sum of p v.
    void mix(const Tile<A>& tile, int64_t count, const A* values, const A* p, const A* scales) const {
        for (int64_t j = 0; j < width; j += ROWS) {
            Lanes<A> found[ROWS][COLUMNS];
            multiply(p, values + j, 1, width, count, found);
            for (int r = 0; r < ROWS; ++r)
                for (int c = 0; c < COLUMNS; ++c) {
                    A* to = tile.mixed + (j + r) * TILE + c * LANES;
                    store(to, multiply_add(load(to, All{}), load(scales + c * LANES, All{}), found[r][c]), All{});
                }
        }
    }

    void end_tile(const Tile<A>& tile) const {
        for (int64_t i = 0; i < tile.count; ++i) {
            T* row = static_cast<T*>(call.out) + ((tile.first + i) * call.heads + tile.head) * call.head_size;
            const auto total = broadcast<Lanes<A>>(tile.totals[i]);
            for_lanes(0, call.head_size, [&](int64_t j, auto n) {
                A held[LANES] = {};
                for (int64_t k = 0; k < smaller(LANES, call.head_size - j); ++k) held[k] = tile.mixed[(j + k) * TILE + i];
                store(row + j, load(held, All{}) / total, n);
            });
        }
    }
};

template <class T>
void run_attention(const Attention& call) {
    using A = arithmetic<T>;
    const Attend<T> attend{call, parts(call.head_size, ROWS) * ROWS};
    const int64_t ratio = call.heads / call.key_heads, shares = parts(ratio, HEADS);  // of the heads of a key head
    const int64_t pieces = call.num_query_chunks * call.key_heads * shares, size = attend.of_piece();
    const int threads = threads_for(4 * pieces * CHUNK_TOKENS * call.head_size, pieces, call.threads);
    const Scratch<A> memory(threads * size);
    parallel_for(pieces, threads, [&](int64_t piece, int thread) {
        const int64_t chunk = piece / (call.key_heads * shares), share = piece % (call.key_heads * shares);
        const int64_t begin = share % shares * HEADS, group = call.query_chunks[chunk];
        Ranges ranges;
        std::memcpy(&ranges, call.groups + 7 * group, sizeof ranges);
        const int32_t* queries = call.queries + 3 * group;  // first, stop, first chunk
        const int64_t first = queries[0] + (chunk - queries[2]) * CHUNK_TOKENS;
        attend.piece(ranges, first, smaller(first + CHUNK_TOKENS, queries[1]), share / shares * ratio + begin,
                     smaller(HEADS, ratio - begin), memory.row(thread, size));
    });
}

}  // namespace

void attention(const Attention& call) {
    with_dtype(call.dtype, [&](auto stored) { run_attention<typename decltype(stored)::type>(call); });
}

}  // namespace adajudge::ADAJUDGE_LEVEL
