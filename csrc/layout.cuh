// What the pooling kernels know of a layout: sequences, their chunks, groups of tokens that the same sequences read.
#pragma once

#include "kernels.h"
#include "vectors.cuh"

namespace adajudge::cuda {

constexpr int8_t PADDING = 0, PROMPT = 1, RESPONSE = 2;  // roles

// A sequence's tokens have positions 0.. that run through its first range, then through its second.
struct Sequence {
    int start0, stop0, start1, stop1, last_response, prompts, responses, first_chunk;

    __device__ int first() const { return stop0 - start0; }
    __device__ int length() const { return prompts + responses; }
    __device__ int chunks() const { return (length() + CHUNK_TOKENS - 1) / CHUNK_TOKENS; }
    __device__ int slot(int position) const {
        return position < first() ? start0 + position : start1 + (position - first());
    }
    __device__ int position(int slot) const {
        return slot >= start0 && slot < stop0 ? slot - start0 : first() + (slot - start1);
    }
};

__device__ inline Sequence sequence_at(const Layout& layout, int64_t b) {
    const int32_t* row = layout.sequences + 8 * b;
    return {row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7]};
}

// Consecutive positions of one sequence.
struct Chunk {
    int64_t sequence_index;
    Sequence sequence;
    int begin, count;
};

__device__ inline Chunk chunk_at(const Layout& layout, int64_t chunk) {
    const int64_t b = layout.chunks[chunk];
    const Sequence s = sequence_at(layout, b);
    const int begin = int(chunk - s.first_chunk) * CHUNK_TOKENS, left = s.length() - begin;
    return {b, s, begin, left < CHUNK_TOKENS ? left : CHUNK_TOKENS};
}

// The roles of a chunk's tokens, to shared memory: else every token's states would wait for its role. The block's threads call
// it together.
__device__ inline void load_roles(const Layout& layout, const Chunk& chunk, int8_t (&roles)[CHUNK_TOKENS]) {
    for (int t = threadIdx.x; t < chunk.count; t += blockDim.x) roles[t] = layout.roles[chunk.sequence.slot(chunk.begin + t)];
    __syncthreads();
}

// A piece of the tokens that lie together and are read by the same consecutive sequences.
struct GroupChunk {
    int start;         // of the group
    int begin, count;  // of the piece, from there
    int first_reader, readers;
};

__device__ inline GroupChunk group_chunk_at(const Layout& layout, int64_t piece) {
    const int32_t* row = layout.groups + 5 * int64_t(layout.group_chunks[piece]);
    const int begin = int(piece - row[4]) * CHUNK_TOKENS, left = row[1] - row[0] - begin;
    return {row[0], begin, left < CHUNK_TOKENS ? left : CHUNK_TOKENS, row[2], row[3]};
}

// A place for up to MAX_DEPTHS tensors in a kernel's arguments.
template <class T>
struct Tensors {
    T* of[MAX_DEPTHS];

    template <class Pointer>
    static Tensors from(const Pointer* pointers, int64_t count) {
        Tensors tensors{};
        for (int64_t k = 0; k < count; ++k) tensors.of[k] = static_cast<T*>(pointers[k]);
        return tensors;
    }
};

}  // namespace adajudge::cuda
