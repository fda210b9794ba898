// Attention inside sequences, against loops over doubles: several heads of queries to one of keys, queries of all tokens or of some.
#include <algorithm>
#include <set>

#include "testing.h"

using namespace testing;

namespace {

// adajudge_kernels.tables.AttentionTables of a layout, for queries of all tokens or of two in three.
struct Groups {
    std::vector<Tokens::Sequence> ranges;  // before, own
    std::vector<int64_t> rows;             // the token of each query
    std::vector<int64_t> group_of;         // of each query, -1 for none

    Groups(const Tokens& tokens, bool some) {
        std::set<int32_t> prompts;
        for (const Tokens::Sequence& s : tokens.sequences) {
            if (s.stop0 > s.start0 && prompts.insert(s.start0).second) ranges.push_back({0, 0, s.start0, s.stop0});
            if (s.stop1 > s.start1) ranges.push_back(s);
        }
        std::sort(ranges.begin(), ranges.end(), [](const auto& a, const auto& b) { return a.start1 < b.start1; });
        for (int64_t t = 0; t < int64_t(tokens.roles.size()); ++t)
            if (!some || t % 3) {
                rows.push_back(t);
                group_of.push_back(-1);
                for (std::size_t g = 0; g < ranges.size(); ++g)
                    if (ranges[g].start1 <= t && t < ranges[g].stop1) group_of.back() = g;
            }
        std::vector<int32_t> groups, queries, chunks;
        for (std::size_t g = 0; g < ranges.size(); ++g) {
            const Tokens::Sequence& s = ranges[g];
            groups.insert(groups.end(), {s.start0, s.stop0, s.start1, s.stop1, 0, 0, 0});
            const auto first = std::lower_bound(rows.begin(), rows.end(), s.start1) - rows.begin();
            const auto stop = std::lower_bound(rows.begin(), rows.end(), s.stop1) - rows.begin();
            queries.insert(queries.end(), {int32_t(first), int32_t(stop), int32_t(chunks.size())});
            chunks.insert(chunks.end(), (stop - first + adajudge::CHUNK_TOKENS - 1) / adajudge::CHUNK_TOKENS, int32_t(g));
        }
        num_chunks = chunks.size();
        for (const auto* values : {&groups, &queries, &chunks}) tables.emplace_back(*values);
    }

    // The tokens that a group's queries see before a token, and it.
    std::vector<int64_t> seen(int64_t g, int64_t token, bool causal) const {
        std::vector<int64_t> slots;
        const Tokens::Sequence& s = ranges[g];
        for (const auto& [start, stop] : {std::pair{s.start0, s.stop0}, std::pair{s.start1, s.stop1}})
            for (int64_t t = start; t < stop; ++t)
                if (!causal || start != s.start1 || t <= token) slots.push_back(t);
        return slots;
    }

    std::vector<Table> tables;
    int64_t num_chunks = 0;
};

}  // namespace

CASE(attention) {
    const int64_t tokens = setting.tokens.roles.size(), e = 1 + setting.features % 131, heads = 10, key_heads = 2;
    const bool shared = setting.tokens.name == "shared";
    for (const auto& [causal, some] : {std::pair{true, false}, std::pair{true, true}, std::pair{false, false}}) {
        if (shared && !causal) continue;  // a prompt does not see the responses
        const Groups groups(setting.tokens, some);
        const int64_t queries = groups.rows.size();
        const double scale = 1 / std::sqrt(e);
        const Buffer query = Buffer::random(setting.dtype, queries * heads * e);
        Buffer out(setting.dtype, queries * heads * e);
        const Buffer key_value = Buffer::random(setting.dtype, tokens * 2 * key_heads * e);  // [T, 2, J, e], as projections come
        const auto* values = static_cast<const unsigned char*>(key_value.data()) + key_heads * e * size_of(setting.dtype);
        on::attention({setting.dtype, setting.threads, heads, key_heads, e, causal, scale, groups.tables[0].data.get(),
                       groups.tables[1].data.get(), groups.tables[2].data.get(), some ? groups.rows.data() : nullptr,
                       groups.num_chunks, query, heads * e, e, key_value, 2 * key_heads * e, e, values, 2 * key_heads * e, e, out});
        const Numbers q = query.numbers(), kv = key_value.numbers();
        Numbers expected = out.numbers();
        for (int64_t row = 0; row < queries; ++row) {
            if (groups.group_of[row] < 0) continue;
            const auto seen = groups.seen(groups.group_of[row], groups.rows[row], causal);
            for (int64_t h = 0; h < heads; ++h) {
                const double* own = q.data() + (row * heads + h) * e;
                double* to = expected.data() + (row * heads + h) * e;
                const auto place = [&](int64_t t, bool value) {
                    return kv.data() + ((t * 2 + value) * key_heads + h / (heads / key_heads)) * e;
                };
                Numbers scores;
                for (int64_t t : seen) {
                    double score = 0;
                    for (int64_t j = 0; j < e; ++j) score += own[j] * place(t, false)[j];
                    scores.push_back(score * scale);
                }
                double top = scores[0], total = 0;
                for (double score : scores) top = std::max(top, score);
                for (double& score : scores) total += score = std::exp(score - top);
                for (int64_t j = 0; j < e; ++j) {
                    to[j] = 0;
                    for (std::size_t i = 0; i < seen.size(); ++i) to[j] += scores[i] / total * place(seen[i], true)[j];
                }
            }
        }
        for (int64_t i = 0; i < out.count; ++i)  // of no group: left as it is, NaN
            if (groups.group_of[i / (heads * e)] < 0) expected[i] = std::isnan(out[i]) ? 0 : 1, out.set(i, 0);
        expect_near("out", out, expected, 8);
    }
}
