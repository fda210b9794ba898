// Rows of states through shared memory by the bulk copy engine of compute capability 9.0 and later: one thread asks for whole
// rows, which arrive while the block still works on earlier ones. No register holds them meanwhile, and nobody waits for an
// address to be computed.
#pragma once

#include "layout.cuh"

// -DADAJUDGE_BULK_COPIES=0 leaves the copy engine alone. Capability 12 has one too, but so little shared memory that few rows
// fit, and needs less under way.
#if !defined(ADAJUDGE_BULK_COPIES)
#if __has_include(<cuda/ptx>)
#define ADAJUDGE_BULK_COPIES 1
#else
#define ADAJUDGE_BULK_COPIES 0
#endif
#endif
// Whether what is being compiled may use it: for devices of 9.0 to 11, and for the host.
#if ADAJUDGE_BULK_COPIES && (!defined(__CUDA_ARCH__) || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200))
#define ADAJUDGE_HAS_COPY_ENGINE 1
#else
#define ADAJUDGE_HAS_COPY_ENGINE 0
#endif

#if ADAJUDGE_BULK_COPIES
#include <cuda/ptx>
#endif

namespace adajudge::cuda {

// A ring of stages, each with room for a step's rows: TOKENS tokens, K states of each. Rows consist of whole sixteen bytes, the
// unit of the engine. A stage has an mbarrier whose phase ends when all bytes that the step asked for have arrived.
template <class T, int TOKENS, int K>
class RowRing {
public:
    __host__ __device__ static constexpr int64_t stage_bytes(int64_t features) { return TOKENS * K * features * int64_t(sizeof(T)); }
    __host__ __device__ static constexpr int64_t bytes(int64_t stages, int64_t features) {
        return stages * (stage_bytes(features) + int64_t(sizeof(uint64_t)));
    }

    // `memory`: bytes(stages, features) of shared memory; without stages there is no ring. A barrier of the block must stand
    // between this and `wait`.
    __device__ RowRing(void* memory, int stages, int features)
        : stages_(stages), features_(features), rows_(static_cast<T*>(memory)),
          arrivals_(reinterpret_cast<uint64_t*>(static_cast<char*>(memory) + stages * stage_bytes(features))) {
#if ADAJUDGE_HAS_COPY_ENGINE
        if (stages && threadIdx.x == 0) {
            for (int stage = 0; stage < stages; ++stage) ::cuda::ptx::mbarrier_init(arrivals_ + stage, 1);
            ::cuda::ptx::fence_mbarrier_init(::cuda::ptx::sem_release, ::cuda::ptx::scope_cluster);
        }
#endif
    }

    // Ask for the next step's rows: of token t, if `wanted(t)`, those that begin at `start(t)` in the K tensors. One thread calls
    // it, when nobody reads any more what the stage held.
    template <class Wanted, class Start>
    __device__ void ask(const Tensors<const T>& states, Wanted wanted, Start start) {
#if ADAJUDGE_HAS_COPY_ENGINE
        namespace ptx = ::cuda::ptx;
        const uint32_t row_bytes = features_ * uint32_t(sizeof(T));
        uint64_t* arrival = arrivals_ + asked_;
        int count = 0;
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) count += wanted(t) ? K : 0;
        ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, arrival, count * row_bytes);
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            if (!wanted(t)) continue;
            const int64_t from = start(t);
#pragma unroll
            for (int k = 0; k < K; ++k)
                ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, at(asked_, t, k), states.of[k] + from, row_bytes, arrival);
        }
        asked_ = asked_ + 1 == stages_ ? 0 : asked_ + 1;
#endif
    }

    // Until the next step's rows are there.
    __device__ void wait() {
#if ADAJUDGE_HAS_COPY_ENGINE
        read_ = next_;
        while (!::cuda::ptx::mbarrier_try_wait_parity(arrivals_ + read_, phase_)) {
        }
        if (++next_ == stages_) {
            next_ = 0;
            phase_ ^= 1;
        }
#endif
    }

    // A row of the step that was waited for last.
    __device__ const T* row(int token, int k) const { return at(read_, token, k); }

private:
    __device__ T* at(int stage, int token, int k) const { return rows_ + ((stage * TOKENS + token) * K + k) * features_; }

    int stages_, features_;
    T* rows_;
    uint64_t* arrivals_;
    int asked_ = 0, next_ = 0, read_ = 0;  // stages
    uint32_t phase_ = 0;
};

}  // namespace adajudge::cuda
