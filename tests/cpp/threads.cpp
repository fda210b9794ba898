// Calls from several threads of a program share the threads that they ask for.
#include "cpu/parallel.h"

#include <atomic>
#include <chrono>
#include <thread>

#include "testing.h"

namespace testing {

void check_threads() {
    constexpr int CALLERS = 4, THREADS = 4;
    std::atomic<int> running{0}, most{0}, pieces{0};
    const auto body = [&](int64_t, int thread) {
        const int now = ++running;
        for (int seen = most; seen < now && !most.compare_exchange_weak(seen, now);) {}
        pieces += thread < THREADS;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        --running;
    };
    std::vector<std::thread> callers;
    for (int i = 0; i < CALLERS; ++i) callers.emplace_back([&] { parallel_for(40, THREADS, body); });
    for (std::thread& caller : callers) caller.join();
    // The first may have all its threads before the others come; they are then one each.
    const bool shared = most <= THREADS + CALLERS - 1, all = pieces == CALLERS * 40, freed = !adajudge::busy_threads;
    if (!shared || !all || !freed) {
        std::printf("threads: %d ran at once, %d pieces, %d threads left busy\n", most.load(), pieces.load(),
                    adajudge::busy_threads);
        ++failures;
    }
    most = 0;
    parallel_for(40, THREADS, body);
    if (most < 2) {
        std::printf("threads: a call that is alone uses one\n");
        ++failures;
    }
}

}  // namespace testing
