// What the tests of the kernels stand on: where they run, numbers in exactly-sized buffers, layouts, comparison with doubles.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

namespace testing {

using adajudge::Dtype;
using adajudge::Layout;
using Numbers = std::vector<double>;

inline std::mt19937_64 generator(1);  // the same numbers in every run

inline int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
// Drawn once, for millions are needed; their number is a prime, so that no row repeats another.
inline double normal() {
    static const std::vector<double> drawn = [] {
        std::vector<double> values(65521);
        for (double& value : values) value = std::normal_distribution<double>()(generator);
        return values;
    }();
    static std::size_t next = 0;
    return drawn[next = (next + 1) % drawn.size()];
}

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }
inline Dtype arithmetic_of(Dtype dtype) { return dtype == Dtype::float64 ? dtype : Dtype::float32; }
// Relative distance of neighbouring numbers.
inline double epsilon_of(Dtype dtype) {
    switch (dtype) {
        case Dtype::float64: return 0x1p-52;
        case Dtype::float32: return 0x1p-23;
        case Dtype::bfloat16: return 0x1p-7;
        default: return 0x1p-10;
    }
}

inline float from_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                       : exponent == 0 ? std::ldexp(float(fraction), -24)
                                       : std::ldexp(float(1024 + fraction), exponent - 25);
    return bits >> 15 ? -size : size;
}

// Numbers stored as a Dtype, in a buffer that ends where they end: AddressSanitizer sees the first byte beyond.
class Buffer {
public:
    Buffer(Dtype dtype, int64_t count) : dtype(dtype), count(count), bytes_(new unsigned char[count * size_of(dtype)]) {
        std::memset(bytes_.get(), 0xff, count * size_of(dtype));  // NaN in every dtype: what is not written is seen
    }

    // Normal numbers. 16-bit ones keep the upper bits of a float or of their own coding, so nothing is rounded here.
    static Buffer random(Dtype dtype, int64_t count, double scale = 1) {
        Buffer buffer(dtype, count);
        for (int64_t i = 0; i < count; ++i) buffer.set(i, scale * normal());
        return buffer;
    }

    void set(int64_t i, double value) {
        if (dtype == Dtype::float64) return put(i, value);
        const float x = float(value);
        if (dtype == Dtype::float32) return put(i, x);
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        if (dtype == Dtype::bfloat16) return put(i, uint16_t(bits >> 16));
        const int exponent = int(bits >> 23 & 255) - 112;
        const uint16_t sign = bits >> 16 & 0x8000;
        put(i, uint16_t(std::isnan(x) ? 0x7e00 : exponent < 1 ? sign : sign | exponent << 10 | (bits >> 13 & 1023)));
    }

    double operator[](int64_t i) const {
        switch (dtype) {
            case Dtype::float64: return get<double>(i);
            case Dtype::float32: return get<float>(i);
            case Dtype::float16: return from_half(get<uint16_t>(i));
            case Dtype::bfloat16: break;
        }
        const uint32_t bits = uint32_t(get<uint16_t>(i)) << 16;
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    }

    // All of them, for loops that read them often.
    Numbers numbers() const {
        Numbers values(count);
        for (int64_t i = 0; i < count; ++i) values[i] = (*this)[i];
        return values;
    }

    void* data() const { return bytes_.get(); }
    operator void*() const { return data(); }

    Dtype dtype;
    int64_t count;

private:
    template <class T>
    void put(int64_t i, T x) {
        std::memcpy(bytes_.get() + i * sizeof(T), &x, sizeof(T));
    }
    template <class T>
    T get(int64_t i) const {
        T x;
        std::memcpy(&x, bytes_.get() + i * sizeof(T), sizeof(T));
        return x;
    }

    std::unique_ptr<unsigned char[]> bytes_;
};

// An exactly-sized copy: a vector may have room beyond its end.
struct Table {
    explicit Table(const std::vector<int32_t>& values) : data(new int32_t[values.size()]) {
        if (!values.empty()) std::memcpy(data.get(), values.data(), values.size() * 4);
    }
    std::unique_ptr<int32_t[]> data;
};

constexpr int8_t PADDING = 0, PROMPT = 1, RESPONSE = 2;

// Where the tokens of each sequence lie, as adajudge_kernels/tables.py describes it.
class Tokens {
public:
    struct Sequence {
        int32_t start0, stop0, start1, stop1;
    };
    struct Group {
        int32_t start, stop, first_reader, readers;
    };

    std::string name;
    std::vector<int8_t> roles;
    std::vector<Sequence> sequences;

    // Prompts of no to many tokens, each followed by its response.
    static Tokens packed(int64_t batch) {
        Tokens tokens("packed");
        for (int64_t b = 0; b < batch; ++b) {
            const int32_t start = tokens.size();
            tokens.append(PROMPT, integer(0, 90)).append(RESPONSE, integer(1, 90));
            tokens.read({start, tokens.size(), 0, 0});
        }
        return tokens.finished();
    }

    // Rows of one length, padding left or right of the tokens; roles in any order, at least one response token.
    static Tokens padded(int64_t batch) {
        Tokens tokens("padded");
        const int64_t width = integer(20, 150);
        for (int64_t b = 0; b < batch; ++b) {
            const int64_t length = integer(1, width), left = integer(0, 1) * (width - length);
            tokens.append(PADDING, left);
            const int32_t start = tokens.size();
            for (int64_t t = 0; t < length; ++t) tokens.append(integer(0, 1) ? PROMPT : RESPONSE, 1);
            tokens.roles[start + integer(0, length - 1)] = RESPONSE;
            tokens.read({start, tokens.size(), 0, 0});
            tokens.append(PADDING, width - length - left);
        }
        return tokens.finished();
    }

    // Every prompt once, before its candidates' responses; some without a token, some without a candidate. Groups are
    // the prompts, then the responses.
    static Tokens shared(int64_t prompts) {
        Tokens tokens("shared");
        std::vector<Group> responses;
        for (int64_t p = 0; p < prompts; ++p) {
            const int32_t start = tokens.size(), candidates = integer(0, 3), first = tokens.sequences.size();
            tokens.append(PROMPT, integer(0, 100));
            const int32_t stop = tokens.size();
            tokens.groups_.push_back({start, stop, first, candidates});
            for (int32_t c = 0; c < candidates; ++c) {
                const int32_t own = tokens.size();
                tokens.append(RESPONSE, integer(1, 80));
                responses.push_back({own, tokens.size(), first + c, 1});
                tokens.sequences.push_back({start, stop, own, tokens.size()});
            }
        }
        tokens.groups_.insert(tokens.groups_.end(), responses.begin(), responses.end());
        return tokens.finished();
    }

    Layout layout() const {
        return {held_roles_.get(), tables_[0].data.get(), tables_[1].data.get(), tables_[2].data.get(),
                tables_[3].data.get(), int64_t(roles.size()), int64_t(sequences.size()), num_chunks_,
                int64_t(groups_.size()), num_group_chunks_};
    }

    // The token slots of a sequence that have one of the roles, in order.
    std::vector<int64_t> slots(int64_t b, bool prompt, bool response) const {
        std::vector<int64_t> found;
        const Sequence& s = sequences[b];
        for (const auto& [start, stop] : {std::pair{s.start0, s.stop0}, std::pair{s.start1, s.stop1}})
            for (int64_t t = start; t < stop; ++t)
                if ((prompt && roles[t] == PROMPT) || (response && roles[t] == RESPONSE)) found.push_back(t);
        return found;
    }

    int64_t batch() const { return sequences.size(); }

    // States [T, d]: what is in padding must not matter.
    Buffer states(Dtype dtype, int64_t d) const {
        Buffer buffer = Buffer::random(dtype, roles.size() * d);
        for (std::size_t t = 0; t < roles.size(); ++t)
            for (int64_t j = 0; roles[t] == PADDING && j < d; ++j) buffer.set(t * d + j, NAN);
        return buffer;
    }

private:
    explicit Tokens(const char* name) : name(name) {}

    int32_t size() const { return roles.size(); }
    Tokens& append(int8_t role, int64_t count) {
        roles.insert(roles.end(), count, role);
        return *this;
    }
    void read(Sequence s) {
        groups_.push_back({s.start0, s.stop0, int32_t(sequences.size()), 1});
        sequences.push_back(s);
    }

    Tokens finished() {
        held_roles_.reset(new int8_t[roles.size()]);
        if (!roles.empty()) std::memcpy(held_roles_.get(), roles.data(), roles.size());
        std::vector<int32_t> rows, chunks, group_rows, group_chunks;
        for (int64_t b = 0; b < batch(); ++b) {
            const Sequence& s = sequences[b];
            const int64_t prompts = slots(b, true, false).size(), responses = slots(b, false, true).size();
            rows.insert(rows.end(), {s.start0, s.stop0, s.start1, s.stop1, int32_t(slots(b, false, true).back()),
                                     int32_t(prompts), int32_t(responses), int32_t(chunks.size())});
            cut(chunks, b, prompts + responses);
        }
        for (std::size_t g = 0; g < groups_.size(); ++g) {
            const Group& group = groups_[g];
            group_rows.insert(group_rows.end(), {group.start, group.stop, group.first_reader, group.readers,
                                                 int32_t(group_chunks.size())});
            cut(group_chunks, g, group.stop - group.start);
        }
        num_chunks_ = chunks.size();
        num_group_chunks_ = group_chunks.size();
        for (const auto* values : {&rows, &chunks, &group_rows, &group_chunks}) tables_.emplace_back(*values);
        return std::move(*this);
    }

    static void cut(std::vector<int32_t>& owners, int64_t owner, int64_t length) {
        owners.insert(owners.end(), (length + adajudge::CHUNK_TOKENS - 1) / adajudge::CHUNK_TOKENS, owner);
    }

    std::vector<Group> groups_;
    std::unique_ptr<int8_t[]> held_roles_;
    std::vector<Table> tables_;
    int64_t num_chunks_ = 0, num_group_chunks_ = 0;
};

// One run of a case: everything that may change how a kernel goes about it.
struct Setting {
    Dtype dtype;
    int threads;
    int64_t features;
    const Tokens& tokens;
};

// Where the kernels run: an instruction set of this processor, or an emulated CUDA device ("cuda-" and a schedule). False if
// this processor lacks it.
bool use_place(const std::string& name);
std::vector<std::string> places();

// The kernels, where `use_place` says. Raised where CUDA has no such operation.
struct NotServed {};
namespace on {
#define DECLARE(name, Call) void name(const adajudge::Call& call);
ADAJUDGE_OPERATIONS(DECLARE)
#undef DECLARE
}  // namespace on

inline std::string where;  // the case that runs
inline int failures = 0;

void check_threads();  // threads.cpp

// Whether every number is what doubles gave, within `ulps` of the dtype, relative to `scale` (the size of the terms).
inline void expect_near(const char* what, const Buffer& got, const Numbers& expected, double ulps, double scale = 4) {
    const double tolerance = ulps * scale * epsilon_of(got.dtype);
    for (int64_t i = 0; i < got.count; ++i)
        if (!(std::abs(got[i] - expected[i]) <= tolerance + ulps * epsilon_of(got.dtype) * std::abs(expected[i]))) {
            std::printf("%s: %s[%lld] is %.9g, expected %.9g\n", where.c_str(), what, (long long)i, got[i], expected[i]);
            ++failures;
            return;
        }
}

// A test: run with every setting. Defining one registers it.
struct Case {
    using Run = void (*)(const Setting&);
    static std::vector<std::pair<const char*, Run>>& all() {
        static std::vector<std::pair<const char*, Run>> cases;
        return cases;
    }
    Case(const char* name, Run run) { all().emplace_back(name, run); }
};

#define CASE(name)                                     \
    static void name(const testing::Setting&);         \
    static const testing::Case case_##name(#name, name); \
    static void name([[maybe_unused]] const testing::Setting& setting)

}  // namespace testing
