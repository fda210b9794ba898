// Fibers for CUDA threads, and the scheduler that decides which of them goes on.
#include "emulation.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <random>
#include <vector>

#include "context.h"
#include "cuda/ptx"
#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace adajudge::cuda {
alignas(128) uint4 shared_bytes[emulation::HOPPER.most_shared_bytes / sizeof(uint4)];  // the kernels' `extern __shared__`
}  // namespace adajudge::cuda

namespace emulation {
namespace {

constexpr int WARP = 32, MOST_THREADS = 1024;
constexpr std::size_t STACK = 256 << 10, USUAL_SHARED_BYTES = 48 << 10;  // of a kernel that has not asked for more

enum class State { ready, waits_for_warp, waits_for_block, waits_for_copies, done };

struct Fiber {
    Context context;
    char* stack = nullptr;
    State state;
    int exchanges = 0;  // of its warp, so far
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
#endif
};

struct Warp {
    uint64_t values[2][WARP];  // of exchanges with even and odd numbers: one may be read while the next is written
    int arrived = 0;
};

// An mbarrier of the block that runs.
struct Arrivals {
    uint32_t expected = 0, missing = 0;  // threads
    int64_t bytes = 0;                   // that are expected and have not come
    uint32_t parity = 0;                 // of the phase that is not over
};

struct Copy {
    void* to;
    const void* from;
    uint32_t bytes;
    uint64_t* barrier;
};

Schedule schedule = Schedule::forward;
Device device = HOPPER;
std::map<Function, int> granted;  // dynamic shared memory beyond the usual
std::map<uint64_t*, Arrivals> barriers;
std::vector<Copy> copies;  // under way
std::mt19937 generator;
std::string reason;

std::vector<Fiber> fibers(MOST_THREADS);
Warp warps[MOST_THREADS / WARP];
Context scheduler;
const std::function<void()>* body;
int threads, current, arrived, done;
std::vector<int> ready;

#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack;
std::size_t scheduler_stack_size;
#endif

// From the scheduler to a fiber, until it waits or is done.
void resume(int index) {
    Fiber& fiber = fibers[index];
    current = index;
    threadIdx = {unsigned(index) % blockDim.x, unsigned(index) / blockDim.x % blockDim.y,
                 unsigned(index) / (blockDim.x * blockDim.y)};
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack;
    __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, STACK);
#endif
    Context::swap(scheduler, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

// From the fiber that runs to the scheduler.
void yield() {
    Fiber& fiber = fibers[current];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fiber.state == State::done ? nullptr : &fiber.fake_stack, scheduler_stack,
                                   scheduler_stack_size);
#endif
    Context::swap(fiber.context, scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack, &scheduler_stack_size);
#endif
}

void start() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
    (*body)();
    fibers[current].state = State::done;
    ++done;
    yield();
}

// Of two threads, whether the second is to run before the first.
bool comes_later(int a, int b) { return schedule == Schedule::forward ? a > b : a < b; }

void add_ready(int index) {
    fibers[index].state = State::ready;
    ready.push_back(index);
    if (schedule != Schedule::random) std::push_heap(ready.begin(), ready.end(), comes_later);
}

void make_ready(int first, int last, State waiting) {
    for (int i = first; i < last; ++i)
        if (fibers[i].state == waiting) add_ready(i);
}

int take_ready() {
    if (schedule == Schedule::random) std::swap(ready[generator() % ready.size()], ready.back());
    else std::pop_heap(ready.begin(), ready.end(), comes_later);
    const int index = ready.back();
    ready.pop_back();
    return index;
}

[[noreturn]] void stop(const std::string& text) {
    std::fprintf(stderr, "block %u, thread %d: %s\n", blockIdx.x, current, text.c_str());
    std::abort();
}

Arrivals& arrivals_at(uint64_t* barrier) {
    const auto found = barriers.find(barrier);
    if (found == barriers.end()) stop("an mbarrier is used that was not initialised");
    return found->second;
}

void end_phase_if_complete(Arrivals& arrivals) {
    if (arrivals.missing || arrivals.bytes) return;
    arrivals.parity ^= 1;
    arrivals.missing = arrivals.expected;
    make_ready(0, threads, State::waits_for_copies);  // they look again
}

void finish_copy(std::size_t index) {
    const Copy copy = copies[index];
    copies.erase(copies.begin() + index);
    std::memcpy(copy.to, copy.from, copy.bytes);
    Arrivals& arrivals = arrivals_at(copy.barrier);
    arrivals.bytes -= copy.bytes;
    end_phase_if_complete(arrivals);
}

// Those that the schedule lets arrive now.
void finish_copies() {
    const auto due = [] {
        if (schedule == Schedule::random) return ready.empty() || generator() % 16 == 0;
        return schedule == Schedule::forward || ready.empty();
    };
    while (!copies.empty() && due()) finish_copy(schedule == Schedule::random ? generator() % copies.size() : 0);
}

bool run_block() {
    arrived = done = 0;
    ready.clear();
    barriers.clear();
    copies.clear();
    for (Warp& warp : warps) warp.arrived = 0;
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        if (!fiber.stack)
            fiber.stack = static_cast<char*>(
                mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        fiber.context.start_at(start, fiber.stack, STACK);
        fiber.exchanges = 0;
        add_ready(i);
    }
    while (!ready.empty()) {
        resume(take_ready());
        if (done == threads && !copies.empty()) {
            reason = "block " + std::to_string(blockIdx.x) + ": ends while copies to its shared memory are under way";
            return false;
        }
        finish_copies();
    }
    if (done == threads) return true;
    const auto waiting = [](State state) {
        return std::count_if(fibers.begin(), fibers.begin() + threads, [=](const Fiber& f) { return f.state == state; });
    };
    reason = "block " + std::to_string(blockIdx.x) + ": " + std::to_string(waiting(State::waits_for_block)) +
             " threads wait at a barrier, " + std::to_string(waiting(State::waits_for_warp)) +
             " at a shuffle that others never reach, " + std::to_string(waiting(State::waits_for_copies)) +
             " for bytes that nobody copies";
    return false;
}

}  // namespace

int lane() { return current % WARP; }

void wait_for_block() {
    if (++arrived == threads) {
        arrived = 0;
        make_ready(0, threads, State::waits_for_block);
        add_ready(current);
    } else {
        fibers[current].state = State::waits_for_block;
    }
    yield();
}

uint64_t exchange(uint64_t value, int from) {
    const int index = current / WARP, first = index * WARP, last = std::min(first + WARP, threads);
    Warp& warp = warps[index];
    auto& values = warp.values[fibers[current].exchanges++ % 2];
    values[current - first] = value;
    if (++warp.arrived == last - first) {
        warp.arrived = 0;
        make_ready(first, last, State::waits_for_warp);
    } else {
        fibers[current].state = State::waits_for_warp;
        yield();
    }
    return values[from];
}

cudaError_t set_attribute(Function kernel, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value > device.most_shared_bytes) {
        reason = "the device has less shared memory";
        return cudaErrorInvalidValue;
    }
    granted[kernel] = value;
    return cudaSuccess;
}

cudaError_t run(Function kernel, const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
    using adajudge::cuda::shared_bytes;
    body = &thread;
    const std::size_t shared_limit = std::max<std::size_t>(USUAL_SHARED_BYTES, granted[kernel]);
    gridDim = config.gridDim;
    blockDim = config.blockDim;
    threads = blockDim.x * blockDim.y * blockDim.z;
    const uint64_t blocks = uint64_t(gridDim.x) * gridDim.y * gridDim.z;
    reason = "";
    if (!threads || threads > MOST_THREADS || !blocks || gridDim.x > 0x7fffffff || gridDim.y > 65535 || gridDim.z > 65535 ||
        config.dynamicSmemBytes > shared_limit) {
        reason = "this grid or this block is too large or empty";
        return cudaErrorInvalidValue;
    }
    std::vector<uint64_t> order(blocks);
    std::iota(order.begin(), order.end(), 0);
    if (schedule == Schedule::backward) std::reverse(order.begin(), order.end());
    if (schedule == Schedule::random) std::shuffle(order.begin(), order.end(), generator);
    bool fine = true;
    for (uint64_t block : order) {
        blockIdx = {unsigned(block % gridDim.x), unsigned(block / gridDim.x % gridDim.y),
                    unsigned(block / gridDim.x / gridDim.y)};
        std::memset(shared_bytes, 0xff, config.dynamicSmemBytes);
#if defined(__SANITIZE_ADDRESS__)
        char* end = reinterpret_cast<char*>(shared_bytes) + config.dynamicSmemBytes;
        const std::size_t rest = sizeof shared_bytes - config.dynamicSmemBytes;
        __asan_poison_memory_region(end, rest);
#endif
        fine = fine && run_block();
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(end, rest);
#endif
    }
    return fine ? cudaSuccess : cudaErrorLaunchFailure;
}

void use_device(const Device& chosen) {
    device = chosen;
    granted.clear();
}

void use_schedule(Schedule chosen, unsigned seed) {
    schedule = chosen;
    generator.seed(seed);
}

const std::string& failure() { return reason; }

}  // namespace emulation

namespace cuda::ptx {

using namespace emulation;

void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
    barriers[barrier] = {arrivals, arrivals};
}

uint64_t mbarrier_arrive_expect_tx(sem_release_t, scope_cta_t, space_shared_t, uint64_t* barrier, uint32_t bytes) {
    Arrivals& arrivals = arrivals_at(barrier);
    if (!arrivals.missing) stop("more threads arrive at an mbarrier than it expects");
    --arrivals.missing;
    arrivals.bytes += bytes;
    end_phase_if_complete(arrivals);
    return 0;
}

void cp_async_bulk(space_cluster_t, space_global_t, void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
    arrivals_at(barrier);
    if ((uintptr_t(to) | uintptr_t(from) | bytes) % 16) stop("a bulk copy takes multiples of sixteen bytes");
    std::memset(to, 0xff, bytes);
    copies.push_back({to, from, bytes, barrier});
}

bool mbarrier_try_wait_parity(uint64_t* barrier, uint32_t parity) {
    while (arrivals_at(barrier).parity == parity) {
        fibers[current].state = State::waits_for_copies;
        yield();
    }
    return true;
}

}  // namespace cuda::ptx

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    using emulation::device;
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = device.capability; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = device.most_shared_bytes; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = device.most_shared_bytes + 1024; break;
        case cudaDevAttrReservedSharedMemoryPerBlock: *value = 1024; break;
    }
    return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
    static std::string text;
    text = "error " + std::to_string(error) + " (" + emulation::failure() + ")";
    return text.c_str();
}
