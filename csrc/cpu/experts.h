// The four MLPs of the gated expert combination as seven products of a view with the weights of hidden units, and their
// hidden layers: what forward and backward share.
//
// The router's input [z_L; z_M; z_A; z_P] is never made: its units read the four views one after the other, each with
// its own d columns of their weights: three products of the view MLPs and four of the router. C = 3 h + h_r.
#pragma once

#include <type_traits>

#include "dtypes.h"
#include "rows.h"

namespace {

using adajudge::Dtype;
using adajudge::Experts;
using adajudge::real;
using adajudge::Weight;

constexpr int MLPS = 4;  // last, mean, attention, router

// Rows and columns of the tiles that a product keeps in registers: as many accumulators as there is place for.
// One column where registers are few: what is read of each row is then used once, straight from memory.
constexpr int TILE_ROWS = REGISTER_BYTES >= 32 ? 4 : 2;
constexpr int TILE_COLUMNS = REGISTER_BYTES == 64 ? 4 : 1;

constexpr int IN_SECOND_CACHE = 2;  // locality of a prefetch
constexpr int64_t ROW_BLOCK = 128;  // rows that each weight is read for once: their views stay in the cache

// Which view times which weights.
struct Product {
    int view;        // 0 .. 3
    bool router;
    int64_t units;   // h or h_r
    int64_t share;   // its first column in the shares of the pre-activations, [B, 3 h + 4 h_r]
    int64_t hidden;  // its MLP's first column in the hidden layers, [B, C]
    int64_t offset, stride;  // in the weight: of the first unit, from unit to unit
};

inline Product product_at(const Experts& call, int64_t index) {
    const int64_t d = call.features, h = call.view_units, h_r = call.router_units;
    if (index < 3) return {static_cast<int>(index), false, h, index * h, index * h, index * h * d, d};
    const int64_t view = index - 3;
    return {static_cast<int>(view), true, h_r, 3 * h + view * h_r, 3 * h, view * d, 4 * d};
}

// A tile of `size` units of one of the products, all numbered through: the product and the tile's first unit.
struct UnitTile {
    Product product;
    int64_t first, stop;
};

inline int64_t unit_tiles(const Experts& call, int64_t size) {
    return 3 * parts(call.view_units, size) + 4 * parts(call.router_units, size);
}

inline UnitTile unit_tile_at(const Experts& call, int64_t index, int64_t size) {
    const int64_t of_view = parts(call.view_units, size), of_router = parts(call.router_units, size);
    const bool router = index >= 3 * of_view;
    if (router) index -= 3 * of_view;
    const int64_t tiles = router ? of_router : of_view;
    const Product product = product_at(call, index / tiles + (router ? 3 : 0));
    const int64_t first = index % tiles * size;
    return {product, first, smaller(first + size, product.units)};
}

inline const Weight& weight_of(const Experts& call, const Product& product) {
    return product.router ? call.router_in : call.view_in;
}

// Columns of one MLP in the hidden layers, and the outputs that they reach: of three scores and three logits.
struct Mlp {
    int64_t units, hidden;
    int first_output, outputs;
};

inline Mlp mlp_at(const Experts& call, int index) {
    if (index < 3) return {call.view_units, index * call.view_units, index, 1};
    return {call.router_units, 3 * call.view_units, 3, 3};
}

inline int64_t hidden_units(const Experts& call) { return 3 * call.view_units + call.router_units; }
inline int64_t weights_of(const Experts& call) { return (hidden_units(call) + 3 * call.router_units) * call.features; }

template <class A>
const A* input(const real* numbers) {
    return static_cast<const A*>(numbers);
}

template <int N>
struct Size {
    static constexpr int value = N;
};

// body(first, Size<R>{}) for groups of R = TILE_ROWS of 0..count, and for the rest.
template <class Body>
ALWAYS_INLINE void for_groups(int64_t count, Body body) {
    int64_t first = 0;
    for (; first + TILE_ROWS <= count; first += TILE_ROWS) body(first, Size<TILE_ROWS>{});
    if constexpr (TILE_ROWS > 2) {
        if (count - first == 3) return body(first, Size<3>{});
        if (count - first == 2) return body(first, Size<2>{});
    }
    if (count - first == 1) body(first, Size<1>{});
}

// out[r][u] += z_r . w_u over `width` features. The order of additions is the same whatever R is. With AHEAD the weights at
// `next` are asked for meanwhile.
template <int R, bool AHEAD, class A, class W, class T>
void add_dot_products(const A* z, int64_t z_stride, const W* const* w, const T* const* next, int64_t width, A* out,
                      int64_t out_stride, int64_t units) {
    Lanes<A> total[R][TILE_COLUMNS];
    for (int r = 0; r < R; ++r)
        for (int u = 0; u < TILE_COLUMNS; ++u) total[r][u] = broadcast<Lanes<A>>(A(0));
    const auto step = [&](int64_t j, auto n) {
        Lanes<A> x[R];
        for (int r = 0; r < R; ++r) x[r] = load(z + r * z_stride + j, n);
        for (int u = 0; u < TILE_COLUMNS; ++u) {
            const Lanes<A> y = load(w[u] + j, n);
            for (int r = 0; r < R; ++r) total[r][u] = multiply_add(x[r], y, total[r][u]);
        }
    };
    if constexpr (AHEAD) {
        const auto ahead = [&](int64_t j) {
            for (int u = 0; u < TILE_COLUMNS; ++u) __builtin_prefetch(next[u] + j, 0, IN_SECOND_CACHE);
        };
        for_lines<W>(0, width, ahead, step);
    } else {
        for_lanes(0, width, step);
    }
    for (int r = 0; r < R; ++r)
        for (int u = 0; u < TILE_COLUMNS; ++u)
            if (u < units) out[r * out_stride + u] += sum<A>(total[r][u]);
}

constexpr int64_t TOGETHER = 4;    // units whose weights lie in the first cache ..
constexpr int64_t SEGMENT = 1024;  // .. with as many rows of views, this many features of each

// The shares of a tile of units and `rows` rows, [rows, columns]; views z [rows, d], weights in the tile's product.
template <class T, class A>
void form_tile(const UnitTile& tile, const T* weights, const A* z, int64_t rows, int64_t d, A* out, int64_t columns,
               A* widened /* [TOGETHER, SEGMENT] */) {
    const int64_t stride = tile.product.stride;
    for (int64_t r = 0; r < rows; ++r) fill_zero(out + r * columns + tile.first, tile.stop - tile.first);
    const auto weights_of_units = [&](int64_t unit, int64_t begin, const T** w) {  // the last stands in for those beyond it
        for (int u = 0; u < TOGETHER; ++u) w[u] = weights + smaller(unit + u, tile.stop - 1) * stride + begin;
    };
    for (int64_t begin = 0; begin < d; begin += SEGMENT) {
        const int64_t width = smaller(SEGMENT, d - begin);
        for (int64_t unit = tile.first; unit < tile.stop; unit += TOGETHER) {
            const int64_t units = smaller(TOGETHER, tile.stop - unit);
            const T *w[TOGETHER], *next[TOGETHER];  // the next are asked for while these are read; after the last, none
            weights_of_units(unit, begin, w);
            if (unit + TOGETHER < tile.stop) weights_of_units(unit + TOGETHER, begin, next);
            else if (begin + SEGMENT < d) weights_of_units(tile.first, begin + SEGMENT, next);
            else std::memcpy(next, w, sizeof w);
            const auto add = [&](auto pointers) {
                for_groups(rows, [&](int64_t r, auto size) {
                    constexpr int R = decltype(size)::value;
                    constexpr bool STORED = std::is_same_v<decltype(pointers), const T* const*>;
                    for (int u = 0; u < units; u += TILE_COLUMNS) {
                        A* to = out + r * columns + unit + u;
                        const A* views = z + r * d + begin;
                        if (r == 0 && STORED)
                            add_dot_products<R, true>(views, d, pointers + u, next + u, width, to, columns, units - u);
                        else
                            add_dot_products<R, false>(views, d, pointers + u, next + u, width, to, columns, units - u);
                    }
                });
            };
            if (sizeof(T) == sizeof(A) || rows <= TILE_ROWS) {  // else widened once for all rows
                add(static_cast<const T* const*>(w));
                continue;
            }
            const A* rows_of_weights[TOGETHER];
            for (int u = 0; u < TOGETHER; ++u) {
                A* to = widened + u * SEGMENT;
                const auto ahead = [&](int64_t j) { __builtin_prefetch(next[u] + j, 0, IN_SECOND_CACHE); };
                for_lines<T>(0, width, ahead, [&](int64_t j, auto n) { store(to + j, load(w[u] + j, n), n); });
                rows_of_weights[u] = to;
            }
            add(static_cast<const A* const*>(rows_of_weights));
        }
    }
}

// Shares of the pre-activations, [B, 3 h + 4 h_r]: z . w of every row and every unit of the seven products. A piece of
// work is a tile of units and a block of rows, so that up to ROW_BLOCK rows each weight is read once.
template <class A>
void form_shares(const Experts& call, A* shares) {
    constexpr int64_t UNITS = 16;
    const int64_t d = call.features, columns = 3 * call.view_units + 4 * call.router_units;
    const int64_t tiles = unit_tiles(call, UNITS), pieces = parts(call.rows, ROW_BLOCK) * tiles;
    const int threads = threads_for(weights_of(call) * parts(call.rows, TOGETHER), pieces, call.threads);
    const Scratch<A> widened(threads * TOGETHER * SEGMENT);
    parallel_for(pieces, threads, [&](int64_t piece, int thread) {
        const UnitTile tile = unit_tile_at(call, piece % tiles, UNITS);
        const Weight& weight = weight_of(call, tile.product);
        const int64_t first = piece / tiles * ROW_BLOCK, rows = smaller(ROW_BLOCK, call.rows - first);
        const A* z = input<A>(call.views[tile.product.view]) + first * d;
        with_dtype(weight.dtype, [&](auto stored) {
            using T = typename decltype(stored)::type;
            if constexpr (sizeof(arithmetic<T>) == sizeof(A))  // fp64 goes with fp64 only
                form_tile(tile, static_cast<const T*>(weight.data) + tile.product.offset, z, rows, d,
                          shares + first * columns + tile.product.share, columns,
                          widened.row(thread, TOGETHER * SEGMENT));
        });
    });
}

template <class A>
struct Row {
    A scores[3], pi[3];
};

// Scores and view weights of one row from its shares; pre, hidden [C]: its pre-activations and silu of them.
template <class A>
Row<A> evaluate(const Experts& call, const A* shares, A* pre, A* hidden) {
    const int64_t h = call.view_units, h_r = call.router_units;
    const A* router_shares = shares + 3 * h;
    Row<A> row;
    for_lanes(0, 3 * h, [&](int64_t j, auto n) {
        store(pre + j, load(input<A>(call.view_in_bias) + j, n) + load(shares + j, n), n);
    });
    for_lanes(0, h_r, [&](int64_t j, auto n) {
        Lanes<A> x = load(input<A>(call.router_in_bias) + j, n);
        for (int view = 0; view < 4; ++view) x += load(router_shares + view * h_r + j, n);
        store(pre + 3 * h + j, x, n);
    });
    for_lanes(0, hidden_units(call), [&](int64_t j, auto n) {
        const Lanes<A> x = load(pre + j, n);
        store(hidden + j, x * sigmoid(x), n);
    });
    for (int v = 0; v < 3; ++v) {
        row.scores[v] = dot(hidden + v * h, input<A>(call.view_out) + v * h, h) + input<A>(call.view_out_bias)[v];
        row.pi[v] = dot(hidden + 3 * h, input<A>(call.router_out) + v * h_r, h_r) + input<A>(call.router_out_bias)[v];
    }
    A top = row.pi[0], total = 0;
    for (A logit : row.pi) top = logit <= top ? top : logit;  // NaN comes through
    for (A& x : row.pi) total += x = exp_of_negative(x - top);
    for (A& x : row.pi) x /= total;
    return row;
}

}  // namespace
