// The kernels as the rest of the program sees them: one call structure per operation, a function that runs it on the CPU
// and, of some, one that runs it on a CUDA device.
//
// Pointers are to contiguous memory in the order of the dimensions that the comments give; `void*` to numbers stored as
// the call's Dtype, `real*` to numbers of its arithmetic: double for fp64, else float. Letters: T token slots, B
// sequences, d features, K refinement blocks, N chunks. Results do not depend on the number of threads; a sequence's
// forward result depends on that sequence alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace adajudge {

enum class Dtype { float64, float32, bfloat16, float16 };

constexpr int CHUNK_TOKENS = 64;  // as in adajudge_kernels/tables.py
constexpr int MAX_DEPTHS = 8;     // as in adajudge_kernels/arguments.py
constexpr int MAX_FEATURES = 16384;

using real = void;  // float or double, as the call's Dtype says

// adajudge_kernels.tables.LayoutTables. `threads` of every call are the CPU's.
struct Layout {
    const int8_t* roles;         // [T]
    const int32_t* sequences;    // [B, 8]
    const int32_t* chunks;       // [N]
    const int32_t* groups;       // [G, 5]
    const int32_t* group_chunks; // [M]
    int64_t num_tokens, num_sequences, num_chunks, num_groups, num_group_chunks;
};

// Means over a sequence's prompt tokens, its response tokens, all of them; each only if it has a place to go to.
struct Means {
    Dtype dtype;
    int threads;
    Layout layout;
    int64_t features;
    const void* hidden;  // [T, d]
    real *prompt, *response, *all;  // [B, d] or null
};

// The gradient of `hidden` from those of its means.
struct SpreadMeans {
    Dtype dtype;
    int threads;
    Layout layout;
    int64_t features;
    const real *prompt, *response, *all;  // [B, d] or null
    void* grad_hidden;                    // [T, d]
};

// alpha = softmax(W c + b) of every sequence.
struct DepthWeights {
    Dtype dtype;
    int64_t num_sequences, features, depths;
    const real *context, *weight, *bias;  // [B, d], [K, d], [K]
    real* alpha;                          // [B, K]
};

// H~ = sum_k alpha_k H_k; its last response token, response mean, and attention-weighted mean.
struct Views {
    Dtype dtype;
    int threads;
    Layout layout;
    int64_t features, depths;
    bool response_only;                  // whether the attention view sees responses only
    const void* const* states;           // K times [T, d]
    const real *alpha, *weight, *bias;   // [B, K], or null for one state as it is; [d]; [1]
    real *last, *mean;                   // [B, d], null without alpha
    real *attention, *log_sum_exp;       // [B, d], [B]
};

// Gradients of `Views`.
struct ViewsBackward {
    Dtype dtype;
    int threads;
    Layout layout;
    int64_t features, depths;
    bool response_only;
    const real *grad_last, *grad_mean, *grad_attention;  // [B, d]; the first two null without alpha
    const void* const* states;                           // K times [T, d]
    const real *alpha, *weight, *bias;                   // as in Views
    const real *attention, *log_sum_exp;                 // as Views gave them
    void* const* grad_states;                            // K times [T, d]
    real *grad_alpha, *grad_weight;                      // [B, K] or null, [d]
};

// u = x + update (or x), rounded as stored, and u / sqrt(mean(u^2) + eps) * weight.
struct RmsNorm {
    Dtype dtype;
    int threads;
    int64_t rows, features;
    double eps;
    const void *x, *update;  // [T, d], update or null
    const real* weight;      // [d]
    void *total, *normed;    // [T, d]; total null without update
};

struct RmsNormBackward {
    Dtype dtype;
    int threads;
    int64_t rows, features;
    double eps;
    const void *grad_total, *grad_normed, *total;  // [T, d], grad_total or null
    const real* weight;                            // [d]
    void* grad;                                    // [T, d]
    real* grad_weight;                             // [d]
};

// silu(gate) * up of a merged projection, gate first.
struct Swiglu {
    Dtype dtype;
    int threads;
    int64_t rows, features;  // f
    const void* gate_up;     // [T, 2f]
    void* out;               // [T, f]
};

struct SwigluBackward {
    Dtype dtype;
    int threads;
    int64_t rows, features;
    const void *grad, *gate_up;  // [T, f], [T, 2f]
    void* grad_gate_up;          // [T, 2f]
};

// Attention inside sequences: softmax(scale Q K^T) V over the keys that a query sees. The numbers of a head lie one after
// another; `_token` and `_head` are the steps, in numbers, from a token or a head to the next.
struct Attention {
    Dtype dtype;
    int threads;
    int64_t heads, key_heads, head_size;  // H, J, e
    bool causal;
    double scale;
    // adajudge_kernels.tables.AttentionTables: [G, 7], [G, 3], [M'], and [N] or null where every token has its row.
    const int32_t *groups, *queries, *query_chunks;
    const int64_t* rows;
    int64_t num_query_chunks;
    const void* query;  // [N, H, e]
    int64_t query_token, query_head;
    const void* key;  // [T, J, e]
    int64_t key_token, key_head;
    const void* value;
    int64_t value_token, value_head;
    void* out;  // [N, H, e], contiguous; rows of no group are left as they are
};

// A large weight of the experts, in a dtype of its own.
struct Weight {
    Dtype dtype;
    const void* data;
};

// Three view scores mixed by the router: h hidden units per view, h_r of the router.
struct Experts {
    bool fp64;
    int threads;
    int64_t rows, features, view_units, router_units;
    const real* views[4];            // last, mean, attention, prompt: [B, d]
    Weight view_in, router_in;       // [3, h, d], [h_r, 4d]
    const real *view_in_bias, *view_out, *view_out_bias;        // [3, h], [3, h], [3]
    const real *router_in_bias, *router_out, *router_out_bias;  // [h_r], [3, h_r], [3]
    real *reward, *scores, *pi;                                 // [B], [B, 3], [B, 3]
};

struct ExpertsBackward {
    Experts forward;                                          // its outputs are not touched
    const real *grad_reward, *grad_scores, *grad_pi;          // [B], [B, 3], [B, 3]
    real* grad_views[4];                                      // [B, d]
    void *grad_view_in, *grad_router_in;                      // as the weights, in their dtypes
    real *grad_view_in_bias, *grad_view_out, *grad_view_out_bias;
    real *grad_router_in_bias, *grad_router_out, *grad_router_out_bias;
};

// The focal Bradley-Terry loss with an entropy floor, and its gradients where they have a place to go to.
struct Loss {
    bool fp64;
    int threads;
    int64_t pairs, sequences;
    double gamma, temperature, entropy_floor, entropy_weight;
    const real *chosen, *rejected, *pair_weight, *view_weights;  // [N], [N], [N] or null, [N', 3] or null
    real *loss;                                                  // [1]
    real *grad_chosen, *grad_pair_weight, *grad_view_weights;    // as the arguments, or null
};

// Those that run on CUDA devices too, and those that do not.
#define ADAJUDGE_CUDA_OPERATIONS(X)         \
    X(means, Means)                         \
    X(spread_means, SpreadMeans)            \
    X(depth_weights, DepthWeights)          \
    X(views, Views)                         \
    X(views_backward, ViewsBackward)        \
    X(experts, Experts)                     \
    X(experts_backward, ExpertsBackward)    \
    X(loss, Loss)
#define ADAJUDGE_CPU_OPERATIONS(X)          \
    X(attention, Attention)                 \
    X(rms_norm, RmsNorm)                    \
    X(rms_norm_backward, RmsNormBackward)   \
    X(swiglu, Swiglu)                       \
    X(swiglu_backward, SwigluBackward)
#define ADAJUDGE_OPERATIONS(X) ADAJUDGE_CUDA_OPERATIONS(X) ADAJUDGE_CPU_OPERATIONS(X)

#define ADAJUDGE_DECLARE(name, Call) void name(const Call& call);

// Run on the instruction set in use (levels.cpp).
ADAJUDGE_OPERATIONS(ADAJUDGE_DECLARE)

// The same on one instruction set: each kernel source is compiled once for each.
namespace plain {
ADAJUDGE_OPERATIONS(ADAJUDGE_DECLARE)
}
#if defined(__x86_64__)
namespace avx2 {
ADAJUDGE_OPERATIONS(ADAJUDGE_DECLARE)
}
namespace avx512 {
ADAJUDGE_OPERATIONS(ADAJUDGE_DECLARE)
}
#endif

// The same on the current CUDA device, where all pointers but a list of pointers are to its memory, tensors from a multiple
// of sixteen bytes on. A call returns when its kernels are in the stream's queue; one that cannot be queued throws.
namespace cuda {

struct Stream {
    void* handle;                               // cudaStream_t
    std::function<void*(std::size_t)> memory;   // device memory that is kept until the call's kernels are done
};

#define ADAJUDGE_DECLARE_CUDA(name, Call) void name(const Call& call, const Stream& stream);
ADAJUDGE_CUDA_OPERATIONS(ADAJUDGE_DECLARE_CUDA)

}  // namespace cuda

// Names of the instruction sets that this processor has, the fastest first, null at the end.
const char* const* levels();
// The one in use: the fastest, or what `use_level` chose.
const char* level();
// False if this processor lacks it.
bool use_level(const char* name);

}  // namespace adajudge
