// Pooling, against loops over doubles.
#include <map>
#include <numeric>

#include "testing.h"

using namespace testing;

namespace {

// The mean over some token slots, zero where there are none.
Numbers mean_of(const Numbers& hidden, const Tokens& tokens, int64_t d, bool prompt, bool response) {
    Numbers means(tokens.batch() * d);
    for (int64_t b = 0; b < tokens.batch(); ++b) {
        const auto slots = tokens.slots(b, prompt, response);
        for (int64_t j = 0; j < d; ++j) {
            for (int64_t t : slots) means[b * d + j] += hidden[t * d + j];
            if (!slots.empty()) means[b * d + j] /= slots.size();
        }
    }
    return means;
}

void softmax(double* logits, int64_t count) {
    double top = logits[0], total = 0;
    for (int64_t i = 1; i < count; ++i) top = std::max(top, logits[i]);
    for (int64_t i = 0; i < count; ++i) total += logits[i] = std::exp(logits[i] - top);
    for (int64_t i = 0; i < count; ++i) logits[i] /= total;
}

// `Views` by its definition; with and without depth weights.
void check_views(const Setting& setting, int64_t depths, bool mixed, bool response_only) {
    const auto& [dtype, threads, d, tokens] = setting;
    const Dtype acc = arithmetic_of(dtype);
    const int64_t batch = tokens.batch();
    std::vector<Buffer> held;
    std::vector<void*> pointers;
    std::vector<Numbers> states;
    for (int64_t k = 0; k < depths; ++k) {
        pointers.push_back(held.emplace_back(tokens.states(dtype, d)));
        states.push_back(held.back().numbers());
    }
    Numbers shares(batch * depths);
    for (double& share : shares) share = normal();
    for (int64_t b = 0; b < batch; ++b) softmax(shares.data() + b * depths, depths);
    Buffer alpha(acc, batch * depths);
    for (int64_t i = 0; i < alpha.count; ++i) alpha.set(i, shares[i]);
    const Buffer weight = Buffer::random(acc, d, 1 / std::sqrt(d)), bias = Buffer::random(acc, 1);
    const Buffer last(acc, mixed ? batch * d : 0), mean(acc, mixed ? batch * d : 0);
    const Buffer attention(acc, batch * d), log_sum_exp(acc, batch);
    adajudge::views({dtype, threads, tokens.layout(), d, depths, response_only, pointers.data(),
                     mixed ? alpha.data() : nullptr, weight, bias, mixed ? last.data() : nullptr,
                     mixed ? mean.data() : nullptr, attention, log_sum_exp});

    const Numbers weights = weight.numbers();
    Numbers expected_last(batch * d), expected_mean(batch * d), expected_attention(batch * d), expected_log(batch);
    for (int64_t b = 0; b < batch; ++b) {
        std::map<int64_t, Numbers> h;  // H~ of each token of the sequence
        for (int64_t t : tokens.slots(b, true, true)) {
            h[t].resize(d);
            for (int64_t k = 0; k < depths; ++k) {
                const double share = mixed ? alpha[b * depths + k] : 1;
                for (int64_t j = 0; j < d; ++j) h[t][j] += share * states[k][t * d + j];
            }
        }
        const auto seen = tokens.slots(b, !response_only, true), responses = tokens.slots(b, false, true);
        Numbers beta;
        double total = 0;
        for (int64_t t : seen) {
            beta.push_back(bias[0] + std::inner_product(h[t].begin(), h[t].end(), weights.begin(), 0.0));
            total += std::exp(beta.back());
        }
        expected_log[b] = std::log(total);
        softmax(beta.data(), beta.size());
        const auto add = [&](Numbers& to, double share, const Numbers& row) {
            for (int64_t j = 0; j < d; ++j) to[b * d + j] += share * row[j];
        };
        for (std::size_t i = 0; i < seen.size(); ++i) add(expected_attention, beta[i], h[seen[i]]);
        for (int64_t t : responses) add(expected_mean, 1.0 / responses.size(), h[t]);
        add(expected_last, 1, h[responses.back()]);
    }
    expect_near("attention", attention, expected_attention, 32);
    expect_near("log_sum_exp", log_sum_exp, expected_log, 32);
    if (!mixed) return;
    expect_near("last", last, expected_last, 8);
    expect_near("mean", mean, expected_mean, 8);
}

}  // namespace

CASE(means) {
    const auto& [dtype, threads, d, tokens] = setting;
    const Buffer hidden = tokens.states(dtype, d);
    const Numbers values = hidden.numbers();
    for (int wanted = 1; wanted < 8; ++wanted) {  // every choice of the three means
        std::vector<Buffer> out;
        void* to[3] = {};
        for (int i = 0; i < 3; ++i)
            if (wanted >> i & 1) to[i] = out.emplace_back(arithmetic_of(dtype), tokens.batch() * d);
        adajudge::means({dtype, threads, tokens.layout(), d, hidden, to[0], to[1], to[2]});
        const Buffer* next = out.data();
        if (to[0]) expect_near("prompt", *next++, mean_of(values, tokens, d, true, false), 8);
        if (to[1]) expect_near("response", *next++, mean_of(values, tokens, d, false, true), 8);
        if (to[2]) expect_near("all", *next++, mean_of(values, tokens, d, true, true), 8);
    }
}

CASE(depth_weights) {
    const int64_t batch = setting.tokens.batch(), d = setting.features;
    const Dtype acc = arithmetic_of(setting.dtype);
    for (int64_t depths : {1, 3, 8}) {
        const Buffer context = Buffer::random(acc, batch * d), bias = Buffer::random(acc, depths);
        const Buffer weight = Buffer::random(acc, depths * d, 1 / std::sqrt(d)), alpha(acc, batch * depths);
        const Numbers contexts = context.numbers(), weights = weight.numbers();
        adajudge::depth_weights({acc, batch, d, depths, context, weight, bias, alpha});
        Numbers expected(batch * depths);
        for (int64_t b = 0; b < batch; ++b) {
            for (int64_t k = 0; k < depths; ++k) {
                expected[b * depths + k] = bias[k];
                for (int64_t j = 0; j < d; ++j) expected[b * depths + k] += contexts[b * d + j] * weights[k * d + j];
            }
            softmax(expected.data() + b * depths, depths);
        }
        expect_near("alpha", alpha, expected, 16);
    }
}

CASE(views) {
    // Depths from 1 to 8 over the settings; all of them at every one would take long.
    const int64_t depths = 1 + (setting.features + setting.threads + int(setting.dtype)) % adajudge::MAX_DEPTHS;
    check_views(setting, depths, true, false);
    check_views(setting, depths, true, true);
}

CASE(attention_pool) { check_views(setting, 1, false, setting.threads == 2); }
