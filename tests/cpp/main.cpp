// Every case on every instruction set and CUDA schedule that was named (default: all that there are), dtype, layout, number
// of threads, and on widths below, at and beyond whole registers.
#include <algorithm>

#include "testing.h"

using namespace testing;

using Names = std::vector<std::string>;

static bool among(const Names& names, const std::string& name) {
    return std::find(names.begin(), names.end(), name) != names.end();
}

// Arguments: widths (numbers), places, dtypes and cases (names; default all), "--stop" to go no further than the first failure.
int main(int count, char** arguments) {
    check_threads();
    const Names dtype_names = {"float64", "float32", "bfloat16", "float16"};
    Names case_names;
    for (const auto& [name, run] : Case::all()) case_names.push_back(name);
    Names named, dtypes, cases;
    std::vector<int64_t> widths;
    bool stop = false;
    for (int i = 1; i < count; ++i) {
        const int64_t width = std::atoll(arguments[i]);
        if (width) widths.push_back(width);
        else if (arguments[i] == std::string("--stop")) stop = true;
        else if (among(dtype_names, arguments[i])) dtypes.push_back(arguments[i]);
        else if (among(case_names, arguments[i])) cases.push_back(arguments[i]);
        else named.push_back(arguments[i]);
    }
    if (widths.empty()) widths = {1, 7, 16, 33, 600, 4100};
    int runs = 0;
    for (const std::string& place : named.empty() ? places() : named) {
        if (!use_place(place)) {
            std::printf("%s: this processor lacks it\n", place.c_str());
            continue;
        }
        const bool on_cuda = place.rfind("cuda", 0) == 0;
        for (int64_t features : widths) {
            // Rows that no CUDA block holds whole. To the CPU a row is a row.
            if (features == 4100 && !on_cuda) continue;
            // Several threads work only where there are enough numbers for them: large layouts for the large width.
            const int64_t batch = features > 2000 ? 2 : features > 500 ? 6 : 3;
            const Tokens layouts[] = {Tokens::packed(batch), Tokens::padded(batch), Tokens::shared(batch / 2), Tokens::packed(0)};
            for (const Tokens& tokens : layouts)
                for (const Dtype dtype : {Dtype::float64, Dtype::float32, Dtype::bfloat16, Dtype::float16}) {
                    if (!dtypes.empty() && !among(dtypes, dtype_names[int(dtype)])) continue;
                    for (int threads : on_cuda ? std::vector{1} : std::vector{1, 2, 3})
                        for (const auto& [name, run] : Case::all()) {
                            if (!cases.empty() && !among(cases, name)) continue;
                            where = std::string(name) + " on " + place + ", " + dtype_names[int(dtype)] + ", " +
                                    tokens.name + ", d=" + std::to_string(features) + ", " + std::to_string(threads) + " threads";
                            try {
                                run({dtype, threads, features, tokens});
                                ++runs;
                            } catch (const NotServed&) {
                            }
                            if (stop && failures) return 1;
                        }
                }
        }
    }
    std::printf("%d runs of %zu cases, %d failed\n", runs, Case::all().size(), failures);
    return failures || !runs;
}
