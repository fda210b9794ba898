// Gradients of the gated expert combination. The hidden layers are formed anew; then each row's gradients of the
// pre-activations; then products of these with weights (gradients of the views) and with views (of the weights).
#include "experts.h"

namespace adajudge::ADAJUDGE_LEVEL {
namespace {

constexpr int64_t WIDTH = 256;     // features of a panel
constexpr int64_t SUMMED = 32;     // rows of a panel: what is summed in registers before it joins the total
constexpr int64_t STEP = TILE_COLUMNS * LANES;

// `count` weights from `offset` on, in the precision of the arithmetic.
template <class A>
void widen_row(const Weight& weight, int64_t offset, int64_t count, A* to) {
    with_dtype(weight.dtype, [&](auto stored) {
        using T = typename decltype(stored)::type;
        if constexpr (sizeof(arithmetic<T>) == sizeof(A)) {  // fp64 goes with fp64 only
            const T* from = static_cast<const T*>(weight.data) + offset;
            for_lanes(0, count, [&](int64_t j, auto n) { store(to + j, load(from + j, n), n); });
        }
    });
}

// out[i][j] += sum_k a[i][k] panel[k][j] for R rows i and `width` features j, a multiple of STEP.
template <int R, class A>
void add_products(const A* a, int64_t a_row, int64_t a_column, const A* panel, int64_t count, int64_t width, A* out) {
    for (int64_t j = 0; j < width; j += STEP) {
        Lanes<A> total[R][TILE_COLUMNS];
        for (int i = 0; i < R; ++i)
            for (int c = 0; c < TILE_COLUMNS; ++c) total[i][c] = broadcast<Lanes<A>>(A(0));
        for (int64_t k = 0; k < count; ++k) {
            Lanes<A> x[TILE_COLUMNS];
            for (int c = 0; c < TILE_COLUMNS; ++c) x[c] = load(panel + k * WIDTH + j + c * LANES, All{});
            for (int i = 0; i < R; ++i) {
                const auto y = broadcast<Lanes<A>>(a[i * a_row + k * a_column]);
                for (int c = 0; c < TILE_COLUMNS; ++c) total[i][c] = multiply_add(y, x[c], total[i][c]);
            }
        }
        for (int i = 0; i < R; ++i)
            for (int c = 0; c < TILE_COLUMNS; ++c) {
                A* to = out + i * WIDTH + j + c * LANES;
                store(to, load(to, All{}) + total[i][c], All{});
            }
    }
}

// What a thread holds: a panel [SUMMED, WIDTH] that is read and a tile [ROW_BLOCK, WIDTH] that is summed up. Both have
// columns to a whole STEP, those after the last feature zero in the panel: what comes of them is not kept.
template <class A>
struct Tiles {
    A *panel, *sums;
    explicit Tiles(A* memory) : panel(memory), sums(memory + SUMMED * WIDTH) {}
    static constexpr int64_t SIZE = (SUMMED + ROW_BLOCK) * WIDTH;
};

inline int64_t whole_steps(int64_t width) { return parts(width, STEP) * STEP; }

template <class A>
struct Backward {
    const ExpertsBackward& call;
    const Experts& forward;
    int64_t rows, d, units;  // B, d, C
    // Per row: gradients of the three scores and of the three logits [B, 6]; the hidden layers and the gradients of the
    // pre-activations [B, C].
    A *outputs, *hidden, *pre;

    void row(int64_t b, const A* shares) const {
        A *dpre = pre + b * units, *layers = hidden + b * units, *doutputs = outputs + 6 * b;
        const Row<A> out = evaluate(forward, shares, dpre, layers);
        const A g = input<A>(call.grad_reward)[b];
        A dpi[3], mean = 0;
        for (int v = 0; v < 3; ++v) {  // r = sum_v pi_v s_v
            doutputs[v] = g * out.pi[v] + input<A>(call.grad_scores)[3 * b + v];
            dpi[v] = g * out.scores[v] + input<A>(call.grad_pi)[3 * b + v];
        }
        for (int v = 0; v < 3; ++v) mean += out.pi[v] * dpi[v];
        for (int v = 0; v < 3; ++v) doutputs[3 + v] = out.pi[v] * (dpi[v] - mean);
        for (int index = 0; index < MLPS; ++index) {
            const Mlp mlp = mlp_at(forward, index);
            const A* weight = index < 3 ? input<A>(forward.view_out) + index * mlp.units : input<A>(forward.router_out);
            A* x = dpre + mlp.hidden;
            for_lanes(0, mlp.units, [&](int64_t j, auto n) {
                auto reach = broadcast<Lanes<A>>(A(0));
                for (int o = 0; o < mlp.outputs; ++o)
                    reach = multiply_add(broadcast<Lanes<A>>(doutputs[mlp.first_output + o]),
                                         load(weight + o * mlp.units + j, n), reach);
                const Lanes<A> z = load(x + j, n), s = sigmoid(z), one = broadcast<Lanes<A>>(A(1));
                store(x + j, reach * (s * (one + z * (one - s))), n);  // silu'(z)
            });
        }
    }

    // dz_v = dpre_v W_v + dpre_router W_r[:, v] of a block of rows and WIDTH features.
    void view(int v, int64_t first_row, int64_t begin, Tiles<A> tiles) const {
        const int64_t count = smaller(ROW_BLOCK, rows - first_row), width = smaller(WIDTH, d - begin);
        fill_zero(tiles.sums, count * WIDTH);
        if (width < whole_steps(width)) fill_zero(tiles.panel, SUMMED * WIDTH);
        for (int index = v < 3 ? v : 6; index <= 3 + v; index += 3) {  // its own MLP, if it has one, and the router
            const Product product = product_at(forward, index);
            for (int64_t unit = 0; unit < product.units; unit += SUMMED) {
                const int64_t summed = smaller(SUMMED, product.units - unit);
                for (int64_t k = 0; k < summed; ++k)
                    widen_row(weight_of(forward, product), product.offset + (unit + k) * product.stride + begin, width,
                              tiles.panel + k * WIDTH);
                const A* a = pre + first_row * units + product.hidden + unit;
                for_groups(count, [&](int64_t i, auto size) {
                    add_products<decltype(size)::value>(a + i * units, units, 1, tiles.panel, summed,
                                                        whole_steps(width), tiles.sums + i * WIDTH);
                });
            }
        }
        A* to = static_cast<A*>(call.grad_views[v]) + first_row * d + begin;
        for (int64_t i = 0; i < count; ++i)
            std::memcpy(to + i * d, tiles.sums + i * WIDTH, static_cast<std::size_t>(width) * sizeof(A));
    }

    // dW = sum_b dpre_b z_b^T of a tile of units, WIDTH features at a time.
    void weight(const UnitTile& tile, Tiles<A> tiles) const {
        for (int64_t begin = 0; begin < d; begin += WIDTH) weight(tile, begin, tiles);
    }

    void weight(const UnitTile& tile, int64_t begin, Tiles<A> tiles) const {
        const Product& product = tile.product;
        const int64_t count = tile.stop - tile.first, width = smaller(WIDTH, d - begin);
        const A* z = input<A>(forward.views[product.view]) + begin;
        fill_zero(tiles.sums, count * WIDTH);
        if (width < whole_steps(width)) fill_zero(tiles.panel, SUMMED * WIDTH);
        for (int64_t b = 0; b < rows; b += SUMMED) {
            const int64_t summed = smaller(SUMMED, rows - b);
            for (int64_t k = 0; k < summed; ++k)
                std::memcpy(tiles.panel + k * WIDTH, z + (b + k) * d, static_cast<std::size_t>(width) * sizeof(A));
            const A* a = pre + b * units + product.hidden + tile.first;
            for_groups(count, [&](int64_t i, auto size) {
                add_products<decltype(size)::value>(a + i, 1, units, tiles.panel, summed, whole_steps(width),
                                                    tiles.sums + i * WIDTH);
            });
        }
        with_dtype(weight_of(forward, product).dtype, [&](auto stored) {
            using T = typename decltype(stored)::type;
            if constexpr (sizeof(arithmetic<T>) == sizeof(A)) {
                T* to = static_cast<T*>(product.router ? call.grad_router_in : call.grad_view_in) + product.offset + begin;
                for (int64_t i = 0; i < count; ++i)
                    for_lanes(0, width, [&](int64_t j, auto n) {
                        store(to + (tile.first + i) * product.stride + j, load(tiles.sums + i * WIDTH + j, n), n);
                    });
            }
        });
    }

    // db_in = sum_b dpre_b and dw_out = sum_b dout_b hidden_b of one MLP, from unit `begin` to `end`.
    template <int OUTPUTS>
    void vectors(const Mlp& mlp, int64_t begin, int64_t end, A* bias, A* out) const {
        for_lanes(begin, end, [&](int64_t j, auto n) {
            LongSum<A> of_bias, of_out[OUTPUTS];
            for (int64_t b = 0; b < rows; ++b) {
                const int64_t place = b * units + mlp.hidden + j;
                const Lanes<A> layer = load(hidden + place, n);
                const A* output = outputs + 6 * b + mlp.first_output;
                of_bias.add(load(pre + place, n));
                for (int o = 0; o < OUTPUTS; ++o) of_out[o].add(layer * broadcast<Lanes<A>>(output[o]));
            }
            store(bias + j, of_bias.total(), n);
            for (int o = 0; o < OUTPUTS; ++o) store(out + o * mlp.units + j, of_out[o].total(), n);
        });
    }

    void vectors(int index, int64_t begin, int64_t end) const {
        const Mlp mlp = mlp_at(forward, index);
        const int64_t column = index * mlp.units;
        if (index == 3)
            return vectors<3>(mlp, begin, end, static_cast<A*>(call.grad_router_in_bias),
                              static_cast<A*>(call.grad_router_out));
        vectors<1>(mlp, begin, end, static_cast<A*>(call.grad_view_in_bias) + column,
                   static_cast<A*>(call.grad_view_out) + column);
    }

    // db_out = sum_b dout_b of the three scores and the three logits.
    void output_biases() const {
        for (int o = 0; o < 6; ++o) {
            double total = 0;  // of few numbers: fp64 costs nothing
            for (int64_t b = 0; b < rows; ++b) total += outputs[6 * b + o];
            static_cast<A*>(o < 3 ? call.grad_view_out_bias : call.grad_router_out_bias)[o % 3] = static_cast<A>(total);
        }
    }
};

template <class A>
void run_experts_backward(const ExpertsBackward& call) {
    const Experts& forward = call.forward;
    const int64_t rows = forward.rows, d = forward.features, units = hidden_units(forward);
    const int64_t columns = 3 * forward.view_units + 4 * forward.router_units, features = parts(d, WIDTH);
    const Scratch<A> shares(rows * columns), layers(2 * rows * units), outputs(6 * rows);
    const Backward<A> backward{call, forward, rows, d, units, outputs.data(), layers.data(), layers.row(rows, units)};
    form_shares(forward, shares.data());
    parallel_for(rows, threads_for(rows * columns, rows, forward.threads),
                 [&](int64_t b, int) { backward.row(b, shares.row(b, columns)); });

    // Views, weights, small weights: all that is left needs nothing of one another.
    constexpr int64_t UNITS = 32;
    const int64_t view_pieces = parts(rows, ROW_BLOCK) * 4 * features, weight_pieces = unit_tiles(forward, UNITS);
    const int64_t of_view = parts(forward.view_units, UNITS), of_router = parts(forward.router_units, UNITS);
    const int64_t pieces = view_pieces + weight_pieces + 3 * of_view + of_router + 1;
    const int threads = threads_for(2 * weights_of(forward) * parts(rows, TOGETHER), pieces, forward.threads);
    const Scratch<A> tiles(threads * Tiles<A>::SIZE);
    parallel_for(pieces, threads, [&](int64_t piece, int thread) {
        const Tiles<A> own(tiles.row(thread, Tiles<A>::SIZE));
        if (piece < view_pieces)
            return backward.view(static_cast<int>(piece / features % 4), piece / (4 * features) * ROW_BLOCK,
                                 piece % features * WIDTH, own);
        piece -= view_pieces;
        if (piece < weight_pieces)
            return backward.weight(unit_tile_at(forward, piece, UNITS), own);
        piece -= weight_pieces;
        if (piece == 3 * of_view + of_router) return backward.output_biases();
        const int mlp = piece < 3 * of_view ? static_cast<int>(piece / of_view) : 3;
        const int64_t begin = (piece - mlp * of_view) * UNITS;
        backward.vectors(mlp, begin, smaller(begin + UNITS, mlp_at(forward, mlp).units));
    });
}

}  // namespace

void experts_backward(const ExpertsBackward& call) {
    call.forward.fp64 ? run_experts_backward<double>(call) : run_experts_backward<float>(call);
}

}  // namespace adajudge::ADAJUDGE_LEVEL
