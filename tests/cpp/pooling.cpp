// Pooling, against loops over doubles.
#include <map>
#include <numeric>

#include "testing.h"

using namespace testing;

namespace {

// to += share * row
void add(Numbers& to, double share, const double* row) {
    for (std::size_t j = 0; j < to.size(); ++j) to[j] += share * row[j];
}

void append(Numbers& to, const Numbers& row) { to.insert(to.end(), row.begin(), row.end()); }

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

// What `Views` and `ViewsBackward` are called with; without depth weights, one state is pooled as it is.
struct ViewArguments {
    Dtype dtype, acc;
    int64_t d, depths, batch;
    bool mixed;
    std::vector<Buffer> states;
    std::vector<void*> pointers;
    std::vector<Numbers> values;  // of the states
    Buffer alpha, weight, bias;
    Numbers weights;

    ViewArguments(const Setting& setting, int64_t depths, bool mixed)
        : dtype(setting.dtype), acc(arithmetic_of(dtype)), d(setting.features), depths(depths),
          batch(setting.tokens.batch()), mixed(mixed), alpha(acc, mixed ? batch * depths : 0),
          weight(Buffer::random(acc, d, 1 / std::sqrt(d))), bias(Buffer::random(acc, 1)), weights(weight.numbers()) {
        for (int64_t k = 0; k < depths; ++k) {
            pointers.push_back(states.emplace_back(setting.tokens.states(dtype, d)));
            values.push_back(states.back().numbers());
        }
        for (int64_t b = 0; mixed && b < batch; ++b) {
            Numbers shares(depths);
            for (double& share : shares) share = normal();
            softmax(shares.data(), depths);
            for (int64_t k = 0; k < depths; ++k) alpha.set(b * depths + k, shares[k]);
        }
    }

    void* if_mixed(const Buffer& buffer) const { return mixed ? buffer.data() : nullptr; }
    double share(int64_t b, int64_t k) const { return mixed ? alpha[b * depths + k] : 1; }
};

// A sequence by its definition: H~ and beta of each token that a view sees, the log-sum-exp, the three views.
struct Seen {
    std::map<int64_t, Numbers> h;
    std::map<int64_t, double> beta;
    std::vector<int64_t> responses;
    double log_sum_exp;
    Numbers last, mean, attention;

    Seen(const ViewArguments& given, const Tokens& tokens, int64_t b, bool response_only)
        : responses(tokens.slots(b, false, true)), mean(given.d), attention(given.d) {
        const auto seen = tokens.slots(b, !response_only, true);
        Numbers logits;
        double total = 0;
        for (int64_t t : seen) {
            h[t].resize(given.d);
            for (int64_t k = 0; k < given.depths; ++k) add(h[t], given.share(b, k), &given.values[k][t * given.d]);
            logits.push_back(given.bias[0] + std::inner_product(h[t].begin(), h[t].end(), given.weights.begin(), 0.0));
            total += std::exp(logits.back());
        }
        log_sum_exp = std::log(total);
        softmax(logits.data(), logits.size());
        for (std::size_t i = 0; i < seen.size(); ++i) {
            beta[seen[i]] = logits[i];
            add(attention, logits[i], h[seen[i]].data());
        }
        for (int64_t t : responses) add(mean, 1.0 / responses.size(), h[t].data());
        last = h[responses.back()];
    }
};

void check_views(const Setting& setting, int64_t depths, bool mixed, bool response_only) {
    const ViewArguments given(setting, depths, mixed);
    const auto& [dtype, threads, d, tokens] = setting;
    const int64_t numbers = given.batch * d;
    const Buffer last(given.acc, mixed ? numbers : 0), mean(given.acc, mixed ? numbers : 0);
    const Buffer attention(given.acc, numbers), log_sum_exp(given.acc, given.batch);
    on::views({dtype, threads, tokens.layout(), d, depths, response_only, given.pointers.data(),
                     given.if_mixed(given.alpha), given.weight, given.bias, given.if_mixed(last), given.if_mixed(mean),
                     attention, log_sum_exp});
    Numbers lasts, means, attentions, logs;
    for (int64_t b = 0; b < given.batch; ++b) {
        const Seen seen(given, tokens, b, response_only);
        append(lasts, seen.last);
        append(means, seen.mean);
        append(attentions, seen.attention);
        logs.push_back(seen.log_sum_exp);
    }
    expect_near("attention", attention, attentions, 32);
    expect_near("log_sum_exp", log_sum_exp, logs, 32);
    if (!mixed) return;
    expect_near("last", last, lasts, 8);
    expect_near("mean", mean, means, 8);
}

void check_views_backward(const Setting& setting, int64_t depths, bool mixed, bool response_only) {
    const ViewArguments given(setting, depths, mixed);
    const auto& [dtype, threads, d, tokens] = setting;
    const int64_t batch = given.batch, slots = tokens.roles.size();
    const Buffer grad_last = Buffer::random(given.acc, batch * d), grad_mean = Buffer::random(given.acc, batch * d);
    const Buffer grad_attention = Buffer::random(given.acc, batch * d);
    const Numbers of_last = grad_last.numbers(), of_mean = grad_mean.numbers(), of_attention = grad_attention.numbers();
    Buffer attention(given.acc, batch * d), log_sum_exp(given.acc, batch);
    // g = [t = tau] g_L + m / n g_M + beta g_A + dlogit w, dlogit = beta g_A . (H~ - z_A)
    std::vector<Numbers> of_states(depths, Numbers(slots * d));
    Numbers of_alpha(batch * depths), of_weight(d);
    for (int64_t b = 0; b < batch; ++b) {
        const Seen seen(given, tokens, b, response_only);
        for (int64_t j = 0; j < d; ++j) attention.set(b * d + j, seen.attention[j]);
        log_sum_exp.set(b, seen.log_sum_exp);
        for (const auto& [t, h] : seen.h) {
            double grad_logit = 0;
            for (int64_t j = 0; j < d; ++j) grad_logit += of_attention[b * d + j] * (h[j] - seen.attention[j]);
            grad_logit *= seen.beta.at(t);
            Numbers g(d);
            if (mixed && t == seen.responses.back()) add(g, 1, &of_last[b * d]);
            if (mixed && tokens.roles[t] == RESPONSE) add(g, 1.0 / seen.responses.size(), &of_mean[b * d]);
            add(g, seen.beta.at(t), &of_attention[b * d]);
            add(g, grad_logit, given.weights.data());
            add(of_weight, grad_logit, h.data());
            for (int64_t k = 0; k < depths; ++k) {
                for (int64_t j = 0; j < d; ++j) of_states[k][t * d + j] += given.share(b, k) * g[j];
                of_alpha[b * depths + k] += std::inner_product(g.begin(), g.end(), &given.values[k][t * d], 0.0);
            }
        }
    }
    std::vector<Buffer> grads;
    std::vector<void*> to;
    for (int64_t k = 0; k < depths; ++k) to.push_back(grads.emplace_back(dtype, slots * d));
    const Buffer grad_alpha(given.acc, mixed ? batch * depths : 0), grad_weight(given.acc, d);
    on::views_backward({dtype, threads, tokens.layout(), d, depths, response_only, given.if_mixed(grad_last),
                              given.if_mixed(grad_mean), grad_attention, given.pointers.data(), given.if_mixed(given.alpha),
                              given.weight, given.bias, attention, log_sum_exp, to.data(), given.if_mixed(grad_alpha),
                              grad_weight});
    for (int64_t k = 0; k < depths; ++k) expect_near("grad_states", grads[k], of_states[k], 32);
    expect_near("grad_weight", grad_weight, of_weight, 64, std::sqrt(d) * 16);  // sums over d and over all tokens
    if (mixed) expect_near("grad_alpha", grad_alpha, of_alpha, 64, d);
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
        on::means({dtype, threads, tokens.layout(), d, hidden, to[0], to[1], to[2]});
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
        on::depth_weights({acc, batch, d, depths, context, weight, bias, alpha});
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

CASE(spread_means) {
    const auto& [dtype, threads, d, tokens] = setting;
    const Dtype acc = arithmetic_of(dtype);
    const int64_t batch = tokens.batch(), slots = tokens.roles.size();
    const Buffer prompt = Buffer::random(acc, batch * d), response = Buffer::random(acc, batch * d);
    const Buffer all = Buffer::random(acc, batch * d);
    for (int wanted = 1; wanted < 8; ++wanted) {
        const Buffer* given[] = {&prompt, &response, &all};
        Numbers expected(slots * d);
        for (int i = 0; i < 3; ++i) {
            if (!(wanted >> i & 1)) given[i] = nullptr;
            for (int64_t b = 0; given[i] && b < batch; ++b) {
                const auto read = tokens.slots(b, i != 1, i != 0);
                for (int64_t t : read)
                    for (int64_t j = 0; j < d; ++j) expected[t * d + j] += (*given[i])[b * d + j] / read.size();
            }
        }
        const Buffer grad_hidden(dtype, slots * d);
        const auto at = [&](int i) { return given[i] ? given[i]->data() : nullptr; };
        on::spread_means({dtype, threads, tokens.layout(), d, at(0), at(1), at(2), grad_hidden});
        expect_near("grad_hidden", grad_hidden, expected, 8);
    }
}

// Depths from 1 to 8 over the settings; all of them at every one would take long.
static int64_t depths_of(const Setting& setting) {
    return 1 + (setting.features + setting.threads + int(setting.dtype)) % adajudge::MAX_DEPTHS;
}

CASE(views) { check_views(setting, depths_of(setting), true, setting.threads == 2); }

CASE(views_backward) { check_views_backward(setting, depths_of(setting), true, setting.threads == 2); }

CASE(attention_pool) { check_views(setting, 1, false, setting.threads == 2); }

CASE(attention_pool_backward) { check_views_backward(setting, 1, false, setting.threads == 2); }
