// What the pooling kernels know of a layout: sequences, their chunks, groups and padding.
#pragma once

#include "dtypes.h"
#include "rows.h"

namespace {

using adajudge::CHUNK_TOKENS;
using adajudge::Layout;
using adajudge::MAX_DEPTHS;
using adajudge::real;

// body(Depths<K>{}) with K = depths known at compile time, or 0 for the many of which that is not worth its code, and for fp64.
template <int K>
struct Depths {
    static constexpr int known = K, most = K ? K : MAX_DEPTHS;
};

template <class A, class Body>
ALWAYS_INLINE auto with_depths(int64_t depths, Body body) {
    if constexpr (sizeof(A) == sizeof(double)) return body(Depths<0>{});
    else switch (depths) {
        case 1: return body(Depths<1>{});
        case 2: return body(Depths<2>{});
        case 3: return body(Depths<3>{});
        case 4: return body(Depths<4>{});
        default: return body(Depths<0>{});
    }
}

constexpr int8_t PADDING = 0, RESPONSE = 2;  // roles; the third, 1, is the prompt's

// A sequence's tokens have positions 0.. that run through its first range, then through its second.
struct Sequence {
    int32_t start0, stop0, start1, stop1, last_response, prompts, responses, first_chunk;

    int64_t first() const { return stop0 - start0; }
    int64_t length() const { return first() + stop1 - start1; }
    int64_t slot(int64_t position) const {
        return position < first() ? start0 + position : start1 + position - first();
    }
};

inline Sequence sequence_at(const Layout& layout, int64_t b) {
    Sequence s;
    std::memcpy(&s, layout.sequences + 8 * b, sizeof s);
    return s;
}

inline int64_t chunks_of(const Sequence& s) { return parts(s.length(), CHUNK_TOKENS); }

// Consecutive positions of one sequence.
struct Chunk {
    int64_t sequence_index, begin, end;
    Sequence sequence;
};

inline Chunk chunk_at(const Layout& layout, int64_t chunk) {
    const int64_t b = layout.chunks[chunk];
    const Sequence s = sequence_at(layout, b);
    const int64_t begin = (chunk - s.first_chunk) * CHUNK_TOKENS;
    return {b, begin, smaller(begin + CHUNK_TOKENS, s.length()), s};
}

// The forward sums over runs of so many chunks: each run leaves a sum that is written and read again.
constexpr int64_t RUN = 8;

// A scan's work: runs of chunks. The last ones are cut, that is, each of their chunks is work of its own, so that all threads
// end together; their sums have the same bits. `Sums` are the rows that are summed, with clear(features), from(feature) for
// those from a feature on, and take(other, features).
class Runs {
public:
    Runs(const Layout& layout, int threads)
        : layout_(layout), cut_(threads > 1 ? layout.num_chunks - threads * RUN : layout.num_chunks) {}

    // The sums over a run, at the number of its first chunk, and over each chunk of a run that is cut. add(tokens, begin, end,
    // sums) adds the tokens at begin..end of a run or a chunk.
    template <class Sums, class Add>
    void scan(int64_t index, Sums* sums, Sums of_chunk, int64_t d, Add add) const {
        Chunk tokens = chunk_at(layout_, index);
        const int64_t place = tokens.begin / CHUNK_TOKENS % RUN;  // in its run
        const bool cut = index - place >= cut_;
        if (place && !cut) return;
        Sums& found = sums[index];
        found.clear(d);
        if (cut) return add(tokens, tokens.begin, tokens.end, found);
        tokens.end = smaller(tokens.begin + RUN * CHUNK_TOKENS, tokens.sequence.length());
        for (int64_t begin = tokens.begin; begin < tokens.end; begin += CHUNK_TOKENS) {
            Sums sum = of_chunk;
            sum.clear(d);
            add(tokens, begin, smaller(begin + CHUNK_TOKENS, tokens.end), sum);
            found.take(sum, d);
        }
    }

    // whole = the sums over a sequence, features begin..end. `of_run` is room for them.
    template <class Sums>
    void combine(const Sequence& s, const Sums* sums, int64_t begin, int64_t end, Sums of_run, Sums& whole) const {
        const int64_t features = end - begin, stop = s.first_chunk + chunks_of(s);
        whole.clear(features);
        for (int64_t run = s.first_chunk; run < stop; run += RUN) {
            if (run < cut_) {
                whole.take(sums[run].from(begin), features);
                continue;
            }
            Sums sum = of_run;
            sum.clear(features);
            for (int64_t chunk = run; chunk < smaller(run + RUN, stop); ++chunk) sum.take(sums[chunk].from(begin), features);
            whole.take(sum, features);
        }
    }

private:
    const Layout& layout_;
    int64_t cut_;  // runs from this chunk on are cut
};

// Tokens that lie together and are read by the same consecutive sequences.
struct Group {
    int32_t start, stop, first_reader, readers, first_chunk;
};

inline Group group_at(const Layout& layout, int64_t g) {
    Group group;
    std::memcpy(&group, layout.groups + 5 * g, sizeof group);
    return group;
}

// Zeros for the rows of `out` that are padding.
template <class T>
void zero_padding(const Layout& layout, void* const* outputs, int64_t count, int64_t d, int threads) {
    constexpr int64_t TOKENS = 256;
    parallel_for(parts(layout.num_tokens, TOKENS), threads, [&](int64_t piece, int) {
        for (int64_t t = piece * TOKENS; t < smaller((piece + 1) * TOKENS, layout.num_tokens); ++t)
            if (layout.roles[t] == PADDING)
                for (int64_t k = 0; k < count; ++k) fill_zero(static_cast<T*>(outputs[k]) + t * d, d);
    });
}

}  // namespace
