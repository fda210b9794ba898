// The gated expert combination: its four MLPs as seven products of a view with the weights of hidden units, and what is
// done for a row once it has them.
//
// The router's input [z_L; z_M; z_A; z_P] is never put together: its units read the four views one after the other, each
// with its own d columns of their weights. So there are three products of the view MLPs and four of the router, and a row's
// shares of the pre-activations have 3 h + 4 h_r columns, while its hidden layers have 3 h + h_r. What is done for a row
// does not depend on the other rows, and nothing is summed by atomics.
#pragma once

#include "block.cuh"
#include "vectors.cuh"

namespace adajudge::cuda {

constexpr int VIEWS = 4;  // last, mean, attention, prompt; the first three have an MLP of their own

struct ExpertSizes {
    int64_t rows, features, view_units, router_units;  // B, d, h, h_r

    __host__ __device__ int64_t columns() const { return 3 * view_units + 4 * router_units; }
    __host__ __device__ int64_t hidden() const { return 3 * view_units + router_units; }
};

// The two large weights, [3, h, d] and [h_r, 4d], or one of them and null: a kernel reads weights of one dtype.
template <class T>
struct LargeWeights {
    T *view_in, *router_in;
};

// A tile of hidden units of one of the products.
template <class T>
struct UnitTile {
    int view;        // that they read
    int64_t units;   // h or h_r
    int64_t first;   // of the tile
    int64_t share;   // column of the product's first unit in the shares
    int64_t hidden;  // column of the MLP's first unit in the hidden layers
    int64_t stride;  // in the weight, from unit to unit
    T* weight;       // of the product's first unit
};

// All tiles of `size` units are numbered through. They are few enough for a grid, and so for 32 bits.
template <class T>
__host__ __device__ unsigned unit_tiles(const ExpertSizes& sizes, const LargeWeights<T>& weights, int size) {
    return (weights.view_in ? 3 * unsigned((sizes.view_units + size - 1) / size) : 0) +
           (weights.router_in ? 4 * unsigned((sizes.router_units + size - 1) / size) : 0);
}

template <class T>
__device__ UnitTile<T> unit_tile_at(const ExpertSizes& sizes, const LargeWeights<T>& weights, unsigned index, int size) {
    const int64_t d = sizes.features, h = sizes.view_units, h_r = sizes.router_units;
    const unsigned of_views = unit_tiles(sizes, LargeWeights<T>{weights.view_in, nullptr}, size);
    const bool is_router = index >= of_views;
    if (is_router) index -= of_views;
    const unsigned tiles = unsigned(((is_router ? h_r : h) + size - 1) / size);
    const int view = int(index / tiles);
    const int64_t first = int64_t(index % tiles) * size;
    if (is_router) return {view, h_r, first, 3 * h + view * h_r, 3 * h, 4 * d, weights.router_in + view * d};
    return {view, h, first, view * h, view * h, d, weights.view_in + view * h * d};
}

// One of four pointers. An index would make the compiler keep them in memory of the thread.
template <class A>
__device__ A* view_at(A* const (&views)[VIEWS], int view) {
    return view == 0 ? views[0] : view == 1 ? views[1] : view == 2 ? views[2] : views[3];
}

// -- Pre-activations ------------------------------------------------------------------------------------------------

// A thread keeps so many weights in registers, all of them on their way at once: they serve SHARE_ROWS rows, so that up to
// this batch each weight is read once.
constexpr int SHARE_ROWS = 16;
constexpr int SHARE_WARPS = 4;  // of a block, at most
template <int W>
constexpr int SHARE_UNITS = W > 1 ? 8 : 4;  // narrow loads are many instructions
template <class T>
constexpr int SHARE_FEATURES = sizeof(T) < 8 ? 16 : 8;  // of a thread

template <class T, int W>
using ShareParts = arithmetic<T>[SHARE_WARPS][SHARE_ROWS][SHARE_UNITS<W>];

template <class T>
struct ShareArguments {
    using A = arithmetic<T>;
    ExpertSizes sizes;
    const A* views[VIEWS];          // [B, d]
    LargeWeights<const T> weights;
    A* shares;                      // [B, segments, 3 h + 4 h_r]
};

// W[units, segment] . z[segment] of a tile of units and of SHARE_ROWS rows. A segment is the features of a block.
// Grid (tiles of units times tiles of rows, segments).
template <class T, int W>
__global__ void __launch_bounds__(SHARE_WARPS* WARP, 1) form_shares(ShareArguments<T> call) {
    using A = arithmetic<T>;
    constexpr int UNITS = SHARE_UNITS<W>, C = SHARE_FEATURES<T>;
    auto& parts = *static_cast<ShareParts<T, W>*>(shared_memory());
    const int64_t d = call.sizes.features;
    const unsigned row_tiles = unsigned((call.sizes.rows + SHARE_ROWS - 1) / SHARE_ROWS);
    const UnitTile<const T> tile = unit_tile_at(call.sizes, call.weights, blockIdx.x / row_tiles, UNITS);
    const int64_t first_row = int64_t(blockIdx.x % row_tiles) * SHARE_ROWS, rows_left = call.sizes.rows - first_row;
    const int rows = int(rows_left < SHARE_ROWS ? rows_left : SHARE_ROWS);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const Columns<W, C> columns{int(d)};
    // Every load is made, of a number that is there if not of the one that is meant: a branch around a load would make what
    // comes after it wait.
    Stored<T, W> stored[UNITS][C / W];
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
        const int64_t unit = tile.first + u < tile.units ? tile.first + u : tile.units - 1;
#pragma unroll
        for (int v = 0; v < C / W; ++v)
            stored[u][v] = Stored<T, W>::load(tile.weight + unit * tile.stride + (columns.inside(v) ? columns.at(v) : 0), true);
    }
    A w[UNITS][C];
#pragma unroll
    for (int u = 0; u < UNITS; ++u)
#pragma unroll
        for (int v = 0; v < C / W; ++v) {
            stored[u][v].widen(w[u] + v * W);
#pragma unroll
            for (int n = 0; n < W; ++n) w[u][v * W + n] = columns.inside(v) ? w[u][v * W + n] : A(0);
        }
    const A* z = view_at(call.views, tile.view) + first_row * d;
    A next[C];
    columns.load(z, next);
    for (int r = 0; r < rows; ++r) {
        A x[C], sums[UNITS];
#pragma unroll
        for (int c = 0; c < C; ++c) x[c] = next[c];
        if (r + 1 < rows) columns.load(z + (r + 1) * d, next);  // on its way while this row is summed
#pragma unroll
        for (int u = 0; u < UNITS; ++u) {
            sums[u] = x[0] * w[u][0];
#pragma unroll
            for (int c = 1; c < C; ++c) sums[u] = multiply_add(x[c], w[u][c], sums[u]);
        }
        const int unit = lane_sums<1, UNITS>(sums);
        if (lane % (WARP / UNITS) == 0) parts[warp][r][unit] = sums[0];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * UNITS; i += blockDim.x) {
        const int r = i / UNITS, u = i % UNITS;
        A sum = parts[0][r][u];
#pragma unroll 1
        for (int other = 1; other < int(blockDim.x) / WARP; ++other) sum += parts[other][r][u];
        A* out = call.shares + ((first_row + r) * gridDim.y + blockIdx.y) * call.sizes.columns() + tile.share;
        if (tile.first + u < tile.units) out[tile.first + u] = sum;
    }
}

// -- A row from its shares --------------------------------------------------------------------------------------------

template <class A>
__device__ A silu(A x) {
    return x / (1 + exp(-x));
}

// sigma(x) (1 + x (1 - sigma(x))).
template <class A>
__device__ A silu_derivative(A x) {
    const A sigma = 1 / (1 + exp(-x));
    return sigma * multiply_add(x, 1 - sigma, A(1));
}

// All weights but the two large ones.
template <class A>
struct SmallWeights {
    const A *view_in_bias, *view_out, *view_out_bias;        // [3, h], [3, h], [3]
    const A *router_in_bias, *router_out, *router_out_bias;  // [h_r], [3, h_r], [3]
};

template <class A>
struct EvaluateArguments {
    ExpertSizes sizes;
    int segments;
    const A* shares;                               // [B, segments, 3 h + 4 h_r]
    SmallWeights<A> weights;
    A *reward, *scores, *pi;                       // forward: [B], [B, 3], [B, 3]
    const A *grad_reward, *grad_scores, *grad_pi;  // backward: [B], [B, 3], [B, 3]
    A *grad_outputs, *hidden, *grad_hidden;        // backward: [B, 6], [B, 3 h + h_r], [B, 3 h + h_r]
};

constexpr int EVALUATE_THREADS = 512;
template <class A>
using OutputSums = BlockSums<A, 8, EVALUATE_THREADS / WARP>;  // three scores, three logits, a power of two

// s_v, pi and r = sum_v pi_v s_v of one row. BACKWARD: in their place the hidden layers, and the gradients of the MLPs'
// outputs and of the pre-activations: ds_v = pi_v g_r + g_s, dpi_v = s_v g_r + g_pi, dlogit = pi (dpi - pi . dpi).
// `grad_outputs` are ds, then dlogit. Grid (B).
template <class A, bool BACKWARD>
__global__ void __launch_bounds__(EVALUATE_THREADS, 1) evaluate(EvaluateArguments<A> call) {
    const int64_t b = blockIdx.x, h = call.sizes.view_units, h_r = call.sizes.router_units;
    const int64_t columns = call.sizes.columns();
    const A* shares = call.shares + b * call.segments * columns;
    const SmallWeights<A>& weights = call.weights;
    A *hidden = nullptr, *grad_hidden = nullptr;
    if constexpr (BACKWARD) {
        hidden = call.hidden + b * call.sizes.hidden();
        grad_hidden = call.grad_hidden + b * call.sizes.hidden();
    }
    A outputs[8] = {};
#pragma unroll 1
    for (int64_t column = threadIdx.x; column < call.sizes.hidden(); column += EVALUATE_THREADS) {
        const int64_t u = column - 3 * h;
        const bool is_router = u >= 0;
        A pre = is_router ? weights.router_in_bias[u] : weights.view_in_bias[column];
#pragma unroll 2
        for (int segment = 0; segment < call.segments; ++segment) {
            const A* share = shares + segment * columns + column;
            pre += share[0];
            if (is_router)
#pragma unroll
                for (int view = 1; view < VIEWS; ++view) pre += share[view * h_r];
        }
        const A activation = silu(pre);
        if constexpr (BACKWARD) {  // the same thread finds them again
            hidden[column] = activation;
            grad_hidden[column] = silu_derivative(pre);
        }
        const int first_output = is_router ? 3 : column >= 2 * h ? 2 : column >= h;
        const A* out = is_router ? weights.router_out + u : weights.view_out + column;
#pragma unroll
        for (int output = 0; output < 6; ++output)
            if (output < 3 ? output == first_output : is_router)
                outputs[output] = multiply_add(activation, output < 3 ? out[0] : out[(output - 3) * h_r], outputs[output]);
    }
    static_cast<OutputSums<A>*>(shared_memory())->sum(outputs, 0);
    A scores[3], pi[3], total = 0;
#pragma unroll
    for (int v = 0; v < 3; ++v) {
        scores[v] = outputs[v] + weights.view_out_bias[v];
        pi[v] = outputs[3 + v] + weights.router_out_bias[v];
    }
    const A top = larger(larger(pi[0], pi[1]), pi[2]);
#pragma unroll
    for (int v = 0; v < 3; ++v) total += pi[v] = exp(pi[v] - top);
#pragma unroll
    for (int v = 0; v < 3; ++v) pi[v] /= total;
    if constexpr (!BACKWARD) {
        if (threadIdx.x) return;
        A reward = 0;
#pragma unroll
        for (int v = 0; v < 3; ++v) {
            reward = multiply_add(pi[v], scores[v], reward);
            call.scores[3 * b + v] = scores[v];
            call.pi[3 * b + v] = pi[v];
        }
        call.reward[b] = reward;
    } else {
        const A grad = call.grad_reward[b];
        A grad_scores[3], grad_logits[3], mean = 0;
#pragma unroll
        for (int v = 0; v < 3; ++v) {
            grad_scores[v] = multiply_add(pi[v], grad, call.grad_scores[3 * b + v]);
            grad_logits[v] = multiply_add(scores[v], grad, call.grad_pi[3 * b + v]);  // of pi, so far
            mean = multiply_add(pi[v], grad_logits[v], mean);
        }
#pragma unroll
        for (int v = 0; v < 3; ++v) grad_logits[v] = pi[v] * (grad_logits[v] - mean);
        if (threadIdx.x == 0)
#pragma unroll
            for (int v = 0; v < 3; ++v) {
                call.grad_outputs[6 * b + v] = grad_scores[v];
                call.grad_outputs[6 * b + 3 + v] = grad_logits[v];
            }
#pragma unroll 1
        for (int64_t column = threadIdx.x; column < call.sizes.hidden(); column += EVALUATE_THREADS) {
            const int64_t u = column - 3 * h;
            A reach = 0;
#pragma unroll
            for (int v = 0; v < 3; ++v) {
                if (u >= 0) reach = multiply_add(grad_logits[v], weights.router_out[v * h_r + u], reach);
                else if (column >= v * h) reach = grad_scores[v] * weights.view_out[column];  // the last such v is its own
            }
            grad_hidden[column] *= reach;
        }
    }
}

}  // namespace adajudge::cuda
