// Gradients of the gated expert combination from those of the pre-activations, which `evaluate` leaves: products with
// sums over hidden units (views), and over rows (weights), each in a fixed order and none of them long.
#pragma once

#include "experts.cuh"

namespace adajudge::cuda {

// -- Views: sums over hidden units ----------------------------------------------------------------------------------

// A block has a tile of rows and features, its threads side by side over the features, and groups of them take the hidden
// units in turn: narrow tiles make many blocks, and up to VIEW_ROWS rows each weight is read once.
constexpr int VIEW_ROWS = 16, VIEW_FEATURES = 64, VIEW_THREADS = 256;
constexpr int VIEW_STEP = 256;  // units whose gradients are in shared memory at a time

template <class A>
constexpr int VIEW_ROW_STRIDE = VIEW_ROWS + 16 / int(sizeof(A));  // in shared memory, against conflicts of its banks

// How W features of a thread, and its row of 16, make the tile.
template <int W>
struct ViewThreads {
    static constexpr int ACROSS = VIEW_FEATURES / W;                           // threads, one group
    static constexpr int GROUPS = VIEW_THREADS / ACROSS;
    static constexpr int OF_WARP = ACROSS < WARP ? WARP / ACROSS : 1;          // groups, which sum up in registers
    static constexpr int SUMS = GROUPS / OF_WARP, ROWS = VIEW_ROWS / OF_WARP;  // left, and rows that a thread has of one
};

// Gradients of the pre-activations while units are summed; after that, in their place, the groups' sums.
template <class A, int W>
union ViewShared {
    A grad[VIEW_STEP][VIEW_ROW_STRIDE<A>];
    A sums[ViewThreads<W>::SUMS][VIEW_ROWS][VIEW_FEATURES];
};

template <class T>
struct ViewGradientArguments {
    using A = arithmetic<T>;
    ExpertSizes sizes;
    const A* grad_hidden;           // [B, 3 h + h_r]
    LargeWeights<const T> weights;  // without view_in its part is there already
    A* grad_views[VIEWS];           // [B, d]
};

// dz_v = W_v^T dpre_v + W_r[:, v]^T dpre_r, the prompt's without the first term. Grid (tiles of rows, blocks of features,
// views).
template <class T, int W>
__global__ void __launch_bounds__(VIEW_THREADS, 1) view_gradients(ViewGradientArguments<T> call) {
    using A = arithmetic<T>;
    using Threads = ViewThreads<W>;
    auto& shared = *static_cast<ViewShared<A, W>*>(shared_memory());
    const int64_t d = call.sizes.features, h = call.sizes.view_units, first_row = int64_t(blockIdx.x) * VIEW_ROWS;
    const int view = blockIdx.z, group = threadIdx.x / Threads::ACROSS, across = threadIdx.x % Threads::ACROSS * W;
    const int64_t begin = int64_t(blockIdx.y) * VIEW_FEATURES, rows = call.sizes.rows - first_row;
    const A* grad_rows = call.grad_hidden + first_row * call.sizes.hidden();
    A sums[W][VIEW_ROWS] = {};
    for (int router = 0; router < 2; ++router) {
        if (router ? !call.weights.router_in : !call.weights.view_in || view == 3) continue;
        const int64_t units = router ? call.sizes.router_units : h, stride = router ? 4 * d : d;
        const int64_t column = router ? 3 * h : view * h;
        const T* weights = router ? call.weights.router_in + view * d : call.weights.view_in + view * h * d;
        weights += begin + across;
        for (int64_t start = 0; start < units; start += VIEW_STEP) {
            const int count = int(units - start < VIEW_STEP ? units - start : VIEW_STEP);
            __syncthreads();  // the step before may still be read
#pragma unroll 4
            for (int i = threadIdx.x; i < VIEW_STEP * VIEW_ROWS; i += VIEW_THREADS) {
                const int u = i % VIEW_STEP, r = i / VIEW_STEP;
                const bool inside = u < count && r < rows;
                shared.grad[u][r] = inside ? grad_rows[r * call.sizes.hidden() + column + start + u] : A(0);
            }
            __syncthreads();
            if (begin + across >= d) continue;
#pragma unroll (sizeof(A) < 8 ? 4 : 1)
            for (int u = group; u < count; u += Threads::GROUPS) {
                A w[W], grad[VIEW_ROWS];
                load<W>(weights + (start + u) * stride, w);
                load<VIEW_ROWS>(shared.grad[u], grad);
#pragma unroll
                for (int c = 0; c < W; ++c)
#pragma unroll
                    for (int r = 0; r < VIEW_ROWS; ++r) sums[c][r] = multiply_add(w[c], grad[r], sums[c][r]);
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < W; ++c) {
        const int first = lane_sums<Threads::ACROSS, VIEW_ROWS>(sums[c]);
#pragma unroll
        for (int r = 0; r < Threads::ROWS; ++r) shared.sums[group / Threads::OF_WARP][first + r][across + c] = sums[c][r];
    }
    __syncthreads();
    const bool adds = !call.weights.view_in && view < 3;
    A* grad = view_at(call.grad_views, view) + first_row * d + begin;
#pragma unroll 1
    for (int i = threadIdx.x; i < VIEW_ROWS * VIEW_FEATURES; i += VIEW_THREADS) {
        const int r = i / VIEW_FEATURES, j = i % VIEW_FEATURES;
        if (r >= rows || begin + j >= d) continue;
        A sum = adds ? grad[r * d + j] : A(0);
#pragma unroll
        for (int s = 0; s < Threads::SUMS; ++s) sum += shared.sums[s][r][j];
        grad[r * d + j] = sum;
    }
}

// -- Large weights: sums over rows ----------------------------------------------------------------------------------

// A block has a tile of hidden units and features, a thread WEIGHT_OWN_UNITS times WEIGHT_OWN_FEATURES of it.
constexpr int WEIGHT_UNITS = 64, WEIGHT_FEATURES = 64;
constexpr int WEIGHT_OWN_UNITS = 4, WEIGHT_OWN_FEATURES = 8;
constexpr int WEIGHT_ACROSS = WEIGHT_FEATURES / WEIGHT_OWN_FEATURES;  // threads
constexpr int WEIGHT_THREADS = WEIGHT_UNITS / WEIGHT_OWN_UNITS * WEIGHT_ACROSS;
constexpr int WEIGHT_STEP = 16;  // rows that are in shared memory at a time
constexpr int WEIGHT_RUN = 64;   // rows that are summed one after another: a sum over all rows is one of such sums

template <class A>
struct WeightTiles {
    A grad[WEIGHT_STEP][WEIGHT_UNITS], z[WEIGHT_STEP][WEIGHT_FEATURES];
};

template <class T>
struct WeightGradientArguments {
    using A = arithmetic<T>;
    ExpertSizes sizes;
    const A* grad_hidden;     // [B, 3 h + h_r]
    const A* views[VIEWS];    // [B, d]
    LargeWeights<T> grads;
};

// dW = sum_b dpre_b z_b^T of a tile of units and the view that they read. Grid (tiles of units, blocks of features).
template <class T>
__global__ void __launch_bounds__(WEIGHT_THREADS, 1) weight_gradients(WeightGradientArguments<T> call) {
    using A = arithmetic<T>;
    constexpr int UNITS = WEIGHT_OWN_UNITS, C = WEIGHT_OWN_FEATURES, W = FULL_WIDTH<T>;
    auto& tiles = *static_cast<WeightTiles<A>*>(shared_memory());
    const int64_t d = call.sizes.features, rows = call.sizes.rows, begin = int64_t(blockIdx.y) * WEIGHT_FEATURES;
    const UnitTile<T> tile = unit_tile_at(call.sizes, call.grads, blockIdx.x, WEIGHT_UNITS);
    const A* grad = call.grad_hidden + tile.hidden + tile.first;
    const A* z = view_at(call.views, tile.view) + begin;
    const int64_t units = tile.units - tile.first, features = d - begin;  // from here on
    const int own_unit = threadIdx.x / WEIGHT_ACROSS * UNITS, own_feature = threadIdx.x % WEIGHT_ACROSS * C;
    A total[UNITS][C] = {};
    for (int64_t run = 0; run < rows; run += WEIGHT_RUN) {
        const int64_t run_end = run + WEIGHT_RUN < rows ? run + WEIGHT_RUN : rows;
        A sums[UNITS][C] = {};
        for (int64_t start = run; start < run_end; start += WEIGHT_STEP) {
            const int count = int(run_end - start < WEIGHT_STEP ? run_end - start : WEIGHT_STEP);
            static_assert(WEIGHT_UNITS == WEIGHT_FEATURES);
            __syncthreads();  // the step before may still be read
#pragma unroll 2
            for (int i = threadIdx.x; i < count * WEIGHT_UNITS; i += WEIGHT_THREADS) {
                const int r = i / WEIGHT_UNITS, j = i % WEIGHT_UNITS;
                tiles.grad[r][j] = j < units ? grad[(start + r) * call.sizes.hidden() + j] : A(0);
                tiles.z[r][j] = j < features ? z[(start + r) * d + j] : A(0);
            }
            __syncthreads();
#pragma unroll (sizeof(A) < 8 ? 2 : 1)
            for (int r = 0; r < count; ++r) {
                A g[UNITS], x[C];
                load<UNITS>(&tiles.grad[r][own_unit], g);
                load<C>(&tiles.z[r][own_feature], x);
#pragma unroll
                for (int u = 0; u < UNITS; ++u)
#pragma unroll
                    for (int c = 0; c < C; ++c) sums[u][c] = multiply_add(g[u], x[c], sums[u][c]);
            }
        }
#pragma unroll
        for (int u = 0; u < UNITS; ++u)
#pragma unroll
            for (int c = 0; c < C; ++c) total[u][c] += sums[u][c];
    }
    const bool whole_vectors = d % W == 0;
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
        if (own_unit + u >= units) continue;
        T* out = tile.weight + (tile.first + own_unit + u) * tile.stride + begin + own_feature;
#pragma unroll
        for (int c = 0; c < C; c += W) {
            if (whole_vectors) {
                if (own_feature + c < features) store<W>(out + c, total[u] + c);
            } else {
#pragma unroll
                for (int n = c; n < c + W; ++n)
                    if (own_feature + n < features) out[n] = narrowed<T>(total[u][n]);
            }
        }
    }
}

// -- Biases and output weights: sums over rows ------------------------------------------------------------------------

constexpr int VECTOR_WARPS = 8;  // that share rows; a lane has a column
constexpr int VECTOR_THREADS = VECTOR_WARPS * WARP;
constexpr int VECTOR_RUN = 32;   // rows that a warp adds one after another
constexpr int VECTOR_SUMS = 4;   // a unit's bias, and the outputs that it reaches

template <class A>
using VectorParts = A[VECTOR_SUMS][VECTOR_WARPS][WARP];

template <class A>
struct VectorGradientArguments {
    ExpertSizes sizes;
    const A *grad_outputs, *hidden, *grad_hidden;  // [B, 6], [B, 3 h + h_r], [B, 3 h + h_r]
    A *view_in_bias, *view_out, *view_out_bias;
    A *router_in_bias, *router_out, *router_out_bias;
};

// db_in = sum_b dpre, dw_out = sum_b dout silu(pre), and db_out = sum_b dout: six columns after those of the hidden layers.
// Grid (blocks of 32 columns).
template <class A>
__global__ void __launch_bounds__(VECTOR_THREADS, 1) vector_gradients(VectorGradientArguments<A> call) {
    auto& parts = *static_cast<VectorParts<A>*>(shared_memory());
    const int64_t rows = call.sizes.rows, width = call.sizes.hidden();
    const int64_t h = call.sizes.view_units, h_r = call.sizes.router_units;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int64_t column = int64_t(blockIdx.x) * WARP + lane;
    const bool is_unit = column < width, is_router = is_unit && column >= 3 * h, is_output = !is_unit && column < width + 6;
    const int first_output = is_router ? 3 : column >= 2 * h ? 2 : column >= h;  // of those that a unit reaches
    A total[VECTOR_SUMS] = {};
    for (int64_t run = warp; run < rows; run += VECTOR_WARPS * VECTOR_RUN) {
        A sums[VECTOR_SUMS] = {};
#pragma unroll (sizeof(A) < 8 ? 4 : 1)
        for (int i = 0; i < VECTOR_RUN; ++i) {
            const int64_t b = run + i * VECTOR_WARPS;
            if (b >= rows) break;
            const A* outputs = call.grad_outputs + 6 * b;
            if (is_unit) {
                const A layer = call.hidden[b * width + column];
                sums[0] += call.grad_hidden[b * width + column];
                sums[1] = multiply_add(layer, outputs[first_output], sums[1]);
                if (is_router) {
                    sums[2] = multiply_add(layer, outputs[4], sums[2]);
                    sums[3] = multiply_add(layer, outputs[5], sums[3]);
                }
            } else if (is_output) {
                sums[0] += outputs[column - width];
            }
        }
#pragma unroll
        for (int s = 0; s < VECTOR_SUMS; ++s) total[s] += sums[s];
    }
#pragma unroll
    for (int s = 0; s < VECTOR_SUMS; ++s) parts[s][warp][lane] = total[s];
    __syncthreads();
    if (warp) return;
#pragma unroll
    for (int s = 0; s < VECTOR_SUMS; ++s) {
        total[s] = parts[s][0][lane];
#pragma unroll
        for (int other = 1; other < VECTOR_WARPS; ++other) total[s] += parts[s][other][lane];
    }
    if (is_router) {
        const int64_t u = column - 3 * h;
        call.router_in_bias[u] = total[0];
#pragma unroll
        for (int v = 0; v < 3; ++v) call.router_out[v * h_r + u] = total[1 + v];
    } else if (is_unit) {
        call.view_in_bias[column] = total[0];
        call.view_out[column] = total[1];
    } else if (is_output) {
        const int64_t output = column - width;
        (output < 3 ? call.view_out_bias : call.router_out_bias)[output % 3] = total[0];
    }
}

}  // namespace adajudge::cuda
